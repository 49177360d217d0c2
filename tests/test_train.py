"""The main job as users run it: real launcher, real ranks, the embedded data, a tiny model."""

import json
import os
import re
import shutil
import signal

import pytest
from train_job import (
    ROOT,
    Job,
    arguments,
    assert_its_last_checkpoint_holds_its_weights,
    losses,
    metrics,
    run,
    status,
)

from laclip import _native
from laclip.checkpoint import find_weights, list_checkpoints, read_state, read_weights
from laclip.cli import main
from laclip.dataset import open_dataset
from laclip.report import render_report
from laclip.train import main as train


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The losses of eight steps on one rank, without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run(arguments(folder))
    assert status(folder)["state"] == "finished"
    assert [record["step"] for record in metrics(folder)] == list(range(8))
    return folder


def test_the_launchers_two_ranks_give_the_losses_of_one(straight, tmp_path):
    _, output = run(arguments(tmp_path / "two"), ranks=2, launcher=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(straight), abs=1e-4)
    assert "2 CPU rank(s)" in output or "CUDA" in output


def test_zero_stage_3_gives_the_losses_of_stage_1(straight, tmp_path):
    run(arguments(tmp_path / "run", stage=3), ranks=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), abs=1e-4)
    assert_its_last_checkpoint_holds_its_weights(tmp_path / "run")
    assert_its_last_checkpoint_holds_its_weights(straight)


def test_gradients_are_clipped_alike_without_zero(tmp_path):
    # An eps that is not small beside the clipped gradients, or AdamW would hide their scale.
    settings = ["optimizer.clip_norm=0.3", "optimizer.eps=1e-2", "train.steps=4"]
    for stage in (0, 3):
        run(arguments(tmp_path / str(stage), *settings, stage=stage))
        assert_its_last_checkpoint_holds_its_weights(tmp_path / str(stage))
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "3"), abs=1e-5)
    assert min(record["gradient_norm"] for record in metrics(tmp_path / "0")) > 0.6


def test_micro_batches_give_the_losses_and_norms_of_the_whole_batch(straight, tmp_path):
    run(arguments(tmp_path / "run", "train.micro_batch_size=8"))
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), abs=1e-5)
    norms = [record["gradient_norm"] for record in metrics(tmp_path / "run")]
    expected = [record["gradient_norm"] for record in metrics(straight)]
    assert norms == pytest.approx(expected, rel=1e-4)


def test_bf16_follows_fp32(straight, tmp_path):
    run(arguments(tmp_path / "run", "train.precision=bf16"))
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=2e-2)
    assert losses(tmp_path / "run") != losses(straight)
    # bf16 would round the scale by up to 3 %.
    scales = [record["logit_scale"] for record in metrics(tmp_path / "run")]
    expected = [record["logit_scale"] for record in metrics(straight)]
    assert scales == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_all_variants_falls_and_does_not_depend_on_the_split(tmp_path):
    found = []
    for name, ranks, more in (("a", 1, []), ("b", 2, ["train.micro_batch_size=8"])):
        settings = ["data.captions=multi", *more, "optimizer.lr=3e-3", "optimizer.start_lr=3e-3"]
        run(arguments(tmp_path / name, *settings), ranks=ranks)
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0][-1] < found[0][0]
    assert not any("variants" in record for record in metrics(tmp_path / "b"))  # none is drawn


def test_a_stopped_and_resumed_run_gives_the_losses_of_one_without_a_stop(straight, tmp_path):
    folder = tmp_path / "run"
    with Job(arguments(folder), ranks=1, pause=2) as job:
        job.wait_for_pause()
        job.processes[0].send_signal(signal.SIGINT)
        job.go_on()
        codes, output = job.wait_for_the_end(), job.output.read_text()
    assert codes == [0], output
    stopped = status(folder)
    assert stopped["state"] == "resumable" and stopped["reason"] == "stopped by SIGINT"
    assert f"--resume {folder}" in output
    assert 0 < stopped["step"] < 8
    words = ["laclip/train.py", "--deepspeed_config", "configs/deepspeed/zero1.json"]
    run([*words, "--resume", str(folder)])
    assert losses(folder) == losses(straight)
    assert status(folder)["state"] == "finished"


def test_a_terminal_that_is_closed_stops_a_run_with_a_checkpoint(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup started the tests
    with Job(arguments(tmp_path / "run"), ranks=1, pause=2) as job:
        job.wait_for_pause()
        job.processes[0].send_signal(signal.SIGHUP)
        job.go_on()
        assert job.wait_for_the_end() == [0], job.output.read_text()
    found = status(job.folder)
    assert (found["state"], found["reason"]) == ("resumable", "stopped by SIGHUP")
    assert found["step"] >= 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A job of Slurm's processes under ZeRO-3, scored as it goes, stopped by a signal to one."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    tasks = 'evaluation.tasks={v={data="examples/emoji/unseen_vendor"}}'
    settings = [tasks, "evaluation.every_steps=2", "checkpoint.keep=1"]
    words = arguments(folder, *settings, "checkpoint.every_steps=100", stage=3)
    with Job(words, pause=5) as job:
        job.wait_for_pause()
        for _ in range(3):  # more of them change nothing
            job.processes[1].send_signal(signal.SIGTERM)
        job.go_on()
        codes = job.wait_for_the_end()
    return folder, codes, job.output.read_text()


def test_slurms_processes_train_and_a_signal_to_one_stops_all(stopped):
    folder, codes, output = stopped
    assert codes == [0, 0], output
    found = status(folder)
    assert (found["state"], found["reason"]) == ("resumable", "stopped by SIGTERM")
    assert 5 <= found["step"] == len(metrics(folder)) < 8
    assert f"--resume {folder}" in output


def test_scores_on_the_way_are_shown_at_once_and_in_an_unfinished_runs_report(stopped):
    folder, _, output = stopped
    for record in metrics(folder):
        if "scores" in record:
            shown = rf"step {record['step'] + 1}/.*  v {100 * record['scores']['v']:.1f} %\n"
            assert re.search(shown, output)
    assert "<!-- Held-out score: v -->" in render_report(folder)


def test_weights_of_an_unfinished_run_are_its_checkpoints(stopped, tmp_path, capsys):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    words = ["export", str(folder), str(tmp_path / "out.pt"), "--format", "open_clip"]
    assert main(words) == 2 and "say --checkpoint newest, best or" in capsys.readouterr().err
    states = [read_state(path) for path in list_checkpoints(folder / "checkpoints")]
    best = max(states, key=lambda state: state["score"] or 0)["step"]
    for which, step in (("best", best), ("newest", states[-1]["step"]), (str(best), best)):
        assert main([*words, "--checkpoint", which]) == 0
        assert f"step_{step:08}' for open_clip" in capsys.readouterr().out
    assert main([*words, "--checkpoint", "77"]) == 2
    assert f"--checkpoint 77: in '{folder}/checkpoints' found {best}" in capsys.readouterr().err
    (folder / "checkpoints" / "step_old").mkdir()  # nothing of ours
    newest = find_weights(folder, "newest")
    file = next(newest.glob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main([*words, "--checkpoint", "newest"]) == 2
    assert f"is damaged: {file.name} is not as it was written" in capsys.readouterr().err
    shutil.rmtree(newest)  # by the run, meanwhile
    with pytest.raises(FileNotFoundError, match="was deleted by its run while it was read"):
        read_weights(newest)
    for path in list_checkpoints(folder / "checkpoints"):
        state = read_state(path) | {"score": None}
        (path / "state.json").write_text(json.dumps(state))
    assert main([*words, "--checkpoint", "best"]) == 2
    assert f"found {best}; none has a score" in capsys.readouterr().err


def test_the_newest_and_the_best_checkpoint_are_kept(stopped):
    folder, *_ = stopped
    states = [
        json.loads((path / "state.json").read_text())
        for path in (folder / "checkpoints").glob("step_*")
    ]
    scored = {
        record["step"] + 1: record["scores"]["v"]
        for record in metrics(folder)
        if "scores" in record
    }
    assert set(scored) >= {2, 4}
    best = max(scored, key=scored.get)
    assert {state["step"]: state["score"] for state in states} == {
        best: scored[best],
        status(folder)["step"]: scored.get(status(folder)["step"]),
    }


def test_one_rank_goes_on_with_what_two_saved(straight, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    words = ["laclip/train.py", "--deepspeed_config", "configs/deepspeed/zero3.json"]
    run([*words, "--resume", str(folder)])
    assert losses(folder) == pytest.approx(losses(straight), abs=1e-4)
    assert "v" in json.loads((folder / "scores.json").read_text())


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(straight, tmp_path):
    folder = tmp_path / "run"
    with Job(arguments(folder), ranks=1, pause=6) as job:
        job.wait_for_pause()
    assert (folder / "checkpoints" / "step_00000004" / "manifest.json").exists()
    _, output = run(arguments(folder))
    assert "going on at step" in output
    assert losses(folder) == losses(straight)


def test_a_damaged_checkpoint_is_named_and_passed_over(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run")
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    newest = folder / "checkpoints" / "step_00000008"
    victim = next(newest.glob("*model_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    _, output = run(arguments(folder))
    assert f"passing over the damaged checkpoint '{newest}': {victim.name}" in output
    assert (newest.with_name(f"damaged_{newest.name}") / victim.name).read_bytes() == content
    assert "going on at step 4" in output
    assert losses(folder) == losses(straight)


def test_an_unfinished_run_of_another_config_is_refused(straight, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text((straight / "config.toml").read_text())
    (folder / "status.json").write_text(json.dumps({"state": "resumable", "step": 4}))
    code, output = run(arguments(folder, "optimizer.lr=0.5"), check=False)
    assert code == 2
    assert "optimizer.lr: 0.001 -> 0.5" in output and "Traceback" not in output


def test_moved_data_is_taken_on_resume_and_changed_data_refused(straight, emoji_copy, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run")
    (folder / "status.json").write_text("")  # what a machine that loses power can leave
    data = f"data.train=['{emoji_copy}']"
    # The weights that a run began with may be gone: they are in its checkpoint.
    _, output = run(arguments(folder, data, "model.weights=gone.pt"))
    assert "going on at step 8" in output
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    manifest = json.loads((emoji_copy / "dataset.json").read_text())
    manifest["shards"] = manifest["shards"][:2]
    (emoji_copy / "dataset.json").write_text(json.dumps(manifest))
    code, output = run(arguments(folder, data), check=False)
    assert code == 2
    assert "was trained on other data" in output and "Traceback" not in output


def test_bad_images_on_one_rank_are_replaced_on_all(emoji_copy, tmp_path):
    dataset = open_dataset(emoji_copy)
    counts = [shard.samples for shard in dataset.shards]
    shard, index = _native.EpochOrder(counts, 0, 0, 16)[40]  # of the second batch
    record = dataset.samples(shard).records[index]
    with dataset.tar_path(shard).open("r+b") as file:
        file.seek(int(record["offset"]) + 2)
        file.write(bytes(int(record["bytes"]) - 2))
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / f"{ranks}"
        run(arguments(folder, f"data.train=['{emoji_copy}']", "train.steps=4"), ranks=ranks)
        found[ranks] = losses(folder)
        (line,) = (folder / "bad_samples.jsonl").read_text().splitlines()
        assert json.loads(line)["sample"] == sum(counts[:shard]) + index
        assert metrics(folder)[-1]["bad_samples"] == 1
    assert found[1] == pytest.approx(found[2], abs=1e-4)


def test_evaluation_of_two_ranks_equals_that_of_one(tmp_path):
    tasks = (
        'evaluation.tasks={v={data="examples/emoji/unseen_vendor"},'
        'p={data="examples/emoji/unseen_phrasing",direction="text_to_image"}}'
    )
    scores = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        data = "data.train=['examples/emoji/unseen_vendor']"
        _, output = run(arguments(folder, data, "train.steps=2", tasks), ranks=ranks)
        assert "400 samples without rewrites" in output
        scores[ranks] = json.loads((folder / "scores.json").read_text())
    assert scores[1]["v"].keys() >= {"top1", "top5", "chance", "n"}
    assert scores[1]["p"].keys() >= {"recall_at_1", "recall_at_5", "chance", "n"}
    for name, score in scores[1].items():
        # One image more or less where two similarities differ by rounding.
        assert scores[2][name] == pytest.approx(score, abs=1.5 / score["n"])
    page = (tmp_path / "1" / "report.html").read_text()
    assert "<svg" in page and "data:image" in page and "recall at 1" in page


BAD_INPUT = {
    "unknown key": (["optimizer.lrr=1"], "did you mean 'lr'"),
    "missing dataset": (["data.train=['nowhere']"], "nowhere"),
    "no dataset": (["data.train=[]"], "data.train: no dataset given"),
    "micro batch": (["train.micro_batch_size=5"], "5 does not divide the 32 samples"),
    "patch size": (["model.vision.patch_size=7"], "model.vision.image_size"),
    "missing task": (["evaluation.tasks={v={data='no/where'}}"], "evaluation.tasks.v: "),
    "no task's data": (["evaluation.tasks={v={direction='zero_shot'}}"], "data: found none"),
    "missing classes": (
        ["evaluation.tasks={v={data='no/where',direction='zero_shot'}}"],
        "evaluation.tasks.v: 'no/where': there is no such folder",
    ),
    "attention": (["model.attention=xformers"], "xformers computes on a GPU alone"),
    "loss": (["train.loss_implementation=triton"], "triton computes on a GPU alone"),
    "embedding": (["model.embed_dim=12"], "found 12, the losses need a multiple of 8"),
    "missing weights": (["model.weights=none.pt"], "none.pt"),
    "random lock": (["model.lock_text=true"], "lock_text: nothing gives the text tower, which"),
    "no steps": (["train.steps=0"], "3,070 samples in batches of 32 for 0 epochs make no step"),
    "large batch": (["train.global_batch_size=3071"], "3,071 is more than the 3,070 samples"),
    "few weights": (["data.captions=weights", "data.weights=[1]"], "found 1, "),
    "short captions": (["model.text.context_length=2"], "found 2, expected 3 or more"),
}


@pytest.fixture
def mistaken(monkeypatch, capsys):
    """mistaken(words): what the job says of its words; in this process, as it ends at once."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})

    def say(words):
        assert train(words[1:]) == 2
        output = capsys.readouterr().err
        assert re.search(r"^laclip: ", output, re.MULTILINE) and "Traceback" not in output
        return output

    return say


@pytest.mark.parametrize("name", BAD_INPUT)
def test_mistakes_end_with_code_2_and_a_message(name, mistaken, tmp_path):
    overrides, message = BAD_INPUT[name]
    assert message in mistaken(arguments(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()  # before the ranks are connected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "the optimizer and its schedule are set in the TOML"),
        ({"train_batch_size": 77}, "train_batch_size is 77, but by train.global_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but by optimizer.clip_norm"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but train.precision"),
        ({"checkpoint": {"load_universal": True}}, "laclip knows how to write and load one"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "unknown key 'overlap_com' in zero_optimization; did you mean 'overlap_comm'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "leaf_module": {"class": []}}},
            "unknown key 'class' in zero_optimization.leaf_module; did you mean 'classes'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "unknown key 'devise' in zero_optimization.offload_optimizer; did you mean 'device'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
            "zero_optimization.reduce_bucket_size: Input should be greater than 0, found -1",
        ),
        (  # of no single key
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}},
            "zero_optimization: Assertion failed, Partial offloading only supported for ZeRO Stage",
        ),
        ("{", "not valid JSON"),
    ],
)
def test_a_json_that_disagrees_is_refused(content, message, mistaken, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    words = arguments(tmp_path / "run")
    words[2] = str(path)
    output = mistaken(words)
    assert message in output and str(path) in output and not (tmp_path / "run").exists()


def test_what_deepspeed_refuses_is_a_message_not_a_traceback(tmp_path):
    words = arguments(tmp_path / "run")
    words[2] = str(tmp_path / "ds.json")
    zero = {"stage": 2, "reduce_scatter": True}
    settings = {"gradient_predivide_factor": 2.0, "zero_optimization": zero}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    code, output = run(words, check=False)
    assert code == 2
    assert "laclip: --deepspeed_config: DeepSpeed refuses it: gradient_predivide_factor" in output
    assert "Traceback" not in output


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused_once(tmp_path):
    code, output = run(arguments(tmp_path / "r", "train.global_batch_size=33"), 2, check=False)
    assert code == 2
    assert output.count("33 does not divide by the 2 ranks; the next that does: 34") == 1


def test_the_launcher_passes_on_the_code_of_a_mistake(tmp_path):
    words = arguments(tmp_path / "run", "optimizer.lrr=1")
    code, output = run(words, launcher=True, check=False)
    assert code == 2
    assert "laclip: --set" not in output and "did you mean 'lr'" in output
