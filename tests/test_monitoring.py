"""What a run reports: metrics.jsonl, TensorBoard, and what the report shows of them."""

import json
import sys

import numpy as np
import pytest

from laclip.metrics import MetricsWriter, read_metrics, variant_shares
from laclip.report import render_report


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


def test_a_tracker_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed. Run: pip install 'laclip\[wan"):
        open_writer(tmp_path, wandb_project="clip")


def test_the_report_draws_the_share_of_the_peak_where_it_is_known(tmp_path):
    for with_share in (False, True):
        more = {"mfu_padded": 0.45, "mfu_real": 0.4} if with_share else {}
        lines = [json.dumps(record(0)), *(json.dumps(record(step, **more)) for step in (1, 2))]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        page = render_report(tmp_path)
        # Curves are SVG, whose text is drawn as paths behind a comment.
        assert ("<!-- Share of the GPU's peak" in page) == with_share
        assert "<!-- Images a second -->" in page
