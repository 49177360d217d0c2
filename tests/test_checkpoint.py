"""Which checkpoints of a run are kept."""

import json

import pytest
import torch

from laclip.checkpoint import _damage, best_score, list_checkpoints, prune_checkpoints
from laclip.parallel import Ranks


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
    (problem,) = _damage(tmp_path, Ranks(0, 1, 0, torch.device("cpu")))
    assert problem.startswith("manifest.json cannot be read")
