"""Which checkpoints of a run are kept, and its weights."""

import json
import resource
import shutil

import pytest
import torch
import torch.distributed as dist

from laclip.checkpoint import (
    _damage,
    best_score,
    find_weights,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    save_weights,
)
from laclip.parallel import JointError, Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def connected():
    """This process as a job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({1: None, 2: None, 3: None}, [2, 3]),
        ({1: 0.2, 2: 0.4, 3: None, 4: 0.3}, [2, 3, 4]),
        ({1: 0.2, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}, [2, 4, 5]),  # a task that is solved
    ],
)
def test_the_newest_two_and_the_first_best_are_kept(scores, kept, tmp_path):
    for step, score in scores.items():
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step, "score": score}))
    (tmp_path / "step_00000001.partial").mkdir()
    best = best_score(tmp_path)
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{s:08d}" for s in kept]
    assert best_score(tmp_path) == best and not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "step_00000001.partial").touch()  # in the way
    (problem,) = prune_checkpoints(tmp_path, keep=1)
    assert "the old checkpoint" in problem and "step_00000001' is not deleted" in problem
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step_00000001", "step_00000003"]


def test_a_damaged_checkpoint_among_the_older_ones_is_no_obstacle(tmp_path):
    for step, text in {1: '{"step": 1, "score": 0.5}', 2: "", 3: '{"step": 3}', 4: "[]"}.items():
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "state.json").write_text(text)
    assert best_score(tmp_path) == 0.5
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000004"]


@pytest.mark.parametrize("content", [b"", b"{", bytes(range(256))])
def test_a_manifest_that_cannot_be_read_is_damage(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    (problem,) = _damage(tmp_path, ALONE)
    assert problem.startswith("manifest.json cannot be read")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(connected, tmp_path):
    assert newest_checkpoint(tmp_path, ALONE) is None
    for step in (4, 8):
        (tmp_path / f"step_{step:08d}").mkdir()
    for _ in range(2):  # nor at the next start
        with pytest.raises(JointError, match="holds damaged checkpoints alone"):
            newest_checkpoint(tmp_path, ALONE)
    names = ["damaged_step_00000004", "damaged_step_00000008"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        shutil.rmtree(tmp_path / name)
    assert newest_checkpoint(tmp_path, ALONE) is None


@pytest.mark.parametrize(("end", "best"), [(0.4, "model.pt"), (0.1, "step_00000002")])
def test_the_weights_of_the_end_may_be_the_best(end, best, tmp_path):
    for step, score in ((2, 0.3), (4, 0.2), (6, None)):
        folder = tmp_path / "checkpoints" / f"step_{step:08}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"score": score}))
    (tmp_path / "model.pt").touch()
    scores = {"v": {"top1": end - 0.1}, "p": {"recall_at_1": end + 0.1, "top1": 0.9}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert find_weights(tmp_path, "best").name == best


def test_weights_that_find_no_room_leave_the_old_ones_and_say_so(tmp_path):
    """As a full disk, a limit on the size of files fails in the midst of a write."""
    path = tmp_path / "model.pt"
    save_weights({"weight": torch.ones(3)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"writing '.*model\.pt': .*\(4 MiB to write, .*MiB were free there"
        ):
            save_weights({"weight": torch.ones(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"writing '.*folder': .*Is a directory"):
        save_weights({"weight": torch.ones(3)}, tmp_path / "folder")
    assert {file.name for file in tmp_path.iterdir()} == {"model.pt", "folder"}
    assert torch.equal(torch.load(path)["weight"], torch.ones(3))
