"""What a run reports: metrics.jsonl, TensorBoard, and what the report shows of them."""

import json
import math
import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from train_job import arguments, metrics, run

from laclip.metrics import MetricsWriter, read_metrics, variant_names, variant_shares
from laclip.report import History, _smooth, _thinned, render_report

# Prints the history that an offline run's file holds, a JSON object a step. The file is a LevelDB
# log behind 7 bytes: blocks of 32 KiB, records of 4 bytes checksum, 2 length, 1 type, and their
# data, which may go on in the next block (types 2, 3, 4: first, middle, last part).
READ_HISTORY = """
import json, sys
from wandb.proto.wandb_internal_pb2 import Record
data, place, whole = open(sys.argv[1], "rb").read(), 7, b""
while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:
        place += 32768 - place % 32768
        continue
    length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
    whole = (b"" if kind in (1, 2) else whole) + data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4) and (history := Record.FromString(whole).history).item:
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in history.item}
        print(json.dumps({"step": history.step.num} | items))
"""


def record(step, **more):
    shares = variant_shares(("original", "llm"), np.array([step, 4 - step]))
    return {
        "step": step,
        "loss": 4.0 - step,
        "lr": 1e-3,
        "logit_scale": 14.0,
        "gradient_norm": 1.0,
        "images_per_second": 100.0,
        "data_wait": 0.1,
        "tflops_padded": 2.0,
        "tflops_real": 1.5,
        "variants": shares,
        **more,
    }


def open_writer(folder, next_step=0, **trackers):
    trackers = {"tensorboard": False, "wandb_project": ""} | trackers
    return MetricsWriter(folder, next_step=next_step, **trackers)


def test_variants_that_differ_from_data_set_to_data_set_are_named_by_their_place():
    assert variant_names([("original", "llm"), ("original", "llm")]) == ("original", "llm")
    mixed = variant_names([("original", "llm"), ("original", "blip", "eda")])
    assert mixed == ("original", "llm or blip", "eda")


def test_every_number_reaches_tensorboard_under_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = open_writer(tmp_path, tensorboard=True)
    for step in range(3):
        writer.write(record(step, mfu_padded=0.45, mfu_real=0.4, skipped=True))
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {f"train/{name}" for name in record(0) if name not in ("step", "variants")}
    names |= {"train/mfu_padded", "train/mfu_real", "train/skipped"}
    assert set(events.Tags()["scalars"]) == names | {"variants/original", "variants/llm"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 4), (1, 3), (2, 2)]
    assert [e.value for e in events.Scalars("variants/llm")] == [1.0, 0.75, 0.5]


def test_a_run_that_goes_on_drops_the_records_that_its_checkpoint_does_not_hold(tmp_path):
    for next_step in (0, 2):
        writer = open_writer(tmp_path, next_step)
        for step in range(next_step, next_step + 4):
            writer.write(record(step, loss=float(next_step)))
        writer.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(6))
    assert [r["loss"] for r in read_metrics(tmp_path)] == [0, 0, 2, 2, 2, 2]


def test_a_run_goes_on_where_the_disk_is_full(tmp_path):
    writer = open_writer(tmp_path)
    for step in range(3):
        writer.write(record(step))
    writer.close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        open_writer(tmp_path, next_step=2).close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]


@pytest.mark.parametrize("torn", ['{"step": 1, "lo', '{"step": 3}\n{"st', "\0\0\0"])
def test_half_a_line_of_a_killed_run_is_dropped(torn, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(0)) + "\n" + torn)
    assert next(read_metrics(tmp_path)) == record(0)
    open_writer(tmp_path, next_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(record(0)) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn.replace("\n", "") + "\n{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl' line 2 is not JSON"):
        list(read_metrics(tmp_path))


def test_numbers_that_are_not_finite_are_null_in_json_and_gaps_in_curves(tmp_path):
    writer = open_writer(tmp_path)
    for step, loss in enumerate((1.5, math.nan, math.inf, 2.5)):
        writer.write(record(step, loss=loss, gradient_norm=loss))
    writer.close()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    history = History(tmp_path)
    assert np.isnan(history.curves["loss"]).tolist() == [False, True, True, False]
    assert "loss 1.500 to 2.500" in render_report(tmp_path)


def test_a_report_of_many_rows_reads_them_one_by_one(tmp_path):
    lines = [json.dumps(record(step)) + "\n" for step in range(20_000)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    del lines
    tracemalloc.start()
    history = History(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 5e6  # 60 MB as dictionaries
    tracemalloc.stop()
    assert len(history.steps) == 20_000 and history.last["step"] == 19_999


def test_thinned_curves_keep_what_is_seen():
    steps, values = np.arange(100_000.0), np.sin(np.arange(100_000.0) / 5000)
    values[[70_001, 20_001]] = 7, -3
    values[50_000:51_000] = math.nan
    kept_steps, kept = _thinned(steps, values)
    assert len(kept) <= 2002 and (kept_steps[0], kept_steps[-1]) == (0, 99_999)
    assert (np.diff(kept_steps) > 0).all()
    assert np.nanmax(kept) == 7 and np.nanmin(kept) == -3
    assert np.isnan(kept[(kept_steps > 50_100) & (kept_steps < 50_900)]).all()
    # Rows that are rare in half of the run keep their places there.
    uneven = np.concatenate([np.arange(50_000.0), np.arange(50_000.0, 100_000, 100)])
    kept_steps, _ = _thinned(uneven, uneven)
    assert set(uneven[50_000:]) <= set(kept_steps)
    short = np.arange(500.0)
    assert np.array_equal(_thinned(short, -short), (short, -short))


def test_a_tracker_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed. Run: pip install 'laclip\[wan"):
        open_writer(tmp_path, wandb_project="clip")


def test_two_ranks_write_one_console_and_hand_every_number_to_weights_and_biases(
    wandb_packages, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(wandb_packages))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    folder = tmp_path / "run"
    settings = ["train.steps=3", "log.every_steps=1", "log.wandb_project=clip"]
    _, output = run(arguments(folder, *settings), ranks=2)
    assert output.count("M parameters") == output.count("step 3/3") == 1
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-c", READ_HISTORY, file]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = []
    for record in metrics(folder):
        shares = {f"variants/{name}": share for name, share in record.pop("variants").items()}
        step = record.pop("step")
        expected.append({"step": step} | {f"train/{k}": v for k, v in record.items()} | shares)
    named = "loss images_per_second tflops_padded tflops_real data_wait memory_mib gradient_norm"
    named += " logit_scale bad_samples"
    assert {f"train/{name}" for name in named.split()} <= expected[0].keys()
    rows = [json.loads(line) for line in found]
    ours = [{key: value for key, value in row.items() if key[0] != "_"} for row in rows]
    assert ours == expected


def test_a_run_of_which_few_steps_were_logged_counts_the_time_of_all(tmp_path):
    (tmp_path / "config.toml").write_text("[train]\nglobal_batch_size = 1000\n")
    lines = [json.dumps(record(step)) for step in range(0, 360, 10)]  # 10 s each
    lines.append(json.dumps(record(359)))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "status.json").touch()  # what a machine that loses power can leave
    assert "360 steps of 1000" in (page := render_report(tmp_path))
    assert "trained for 1:00:00" in page


def test_scores_on_the_way_are_drawn_where_the_status_was_lost(tmp_path):
    scores = {"v": {"top1": 0.3, "top5": 0.5, "chance": 0.1, "n": 9}}
    lines = [json.dumps(record(0, scores={"v": 0.2})), json.dumps(record(1))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "status.json").touch()
    assert "Held-out score: v" in render_report(tmp_path)


def test_curves_are_smoothed_over_a_twentieth_of_the_run_without_skipped_steps():
    assert _smooth(np.array([1.0, 2.0, 6.0, 8.0])).tolist() == pytest.approx([1.5, 3, 16 / 3, 7])
    assert _smooth(np.array([1.0, math.nan, 6.0])).tolist() == pytest.approx([1, 3.5, 6])
    assert _smooth(np.arange(400_000.0))[200_000] == 200_000


def test_the_report_draws_the_share_of_the_peak_where_it_is_known(tmp_path):
    for with_share in (False, True):
        more = {"mfu_padded": 0.45, "mfu_real": 0.4} if with_share else {}
        lines = [json.dumps(record(0)), *(json.dumps(record(step, **more)) for step in (1, 2))]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        page = render_report(tmp_path)
        # Curves are SVG, whose text is drawn as paths behind a comment.
        assert ("<!-- Share of the GPU's peak" in page) == with_share
        assert "<!-- Images a second -->" in page
