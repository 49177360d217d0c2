"""laclip import, export and report on a run's folder."""

import json

import pytest
import torch

from laclip.cli import main
from laclip.config import load_config
from laclip.model import build_model
from laclip.typed_toml import dump

SMALL = [
    *("model.vision.depth=1", "model.vision.width=64", "model.vision.heads=1"),
    *("model.vision.image_size=32", "model.vision.patch_size=16", "model.embed_dim=32"),
    *("model.text.depth=1", "model.text.width=64", "model.text.heads=1"),
]


def finished_run(folder, *overrides):
    config = load_config(None, [*SMALL, *overrides])
    folder.mkdir()
    (folder / "config.toml").write_text(dump(config))
    model = build_model(config.model, 49408, 49407)
    torch.save(model.state_dict(), folder / "model.pt")
    return model


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("open_clip", []),
        ("open_clip", ["model.vision.qk_norm=true", "model.vision.pre_norm=false"]),
        ("laclip_release", ["model.vision.qk_norm=true", "model.vision.pre_norm=false"]),
        ("hugging_face", []),
    ],
)
def test_exported_weights_come_back_bit_for_bit(kind, family, tmp_path, capsys):
    family = [*family, "model.vision.patch_bias=true"] if family else family
    model = finished_run(tmp_path / "run", *family)
    out = tmp_path / "new" / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--format", kind]) == 0
    if kind == "hugging_face":
        assert json.loads((out / "config.json").read_text())["model_type"] == "clip"
    assert main(["import", str(out), str(tmp_path / "other" / "back.pt")]) == 0
    assert f"from {kind}" in capsys.readouterr().out
    back = torch.load(tmp_path / "other" / "back.pt", weights_only=True)
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_mistakes_are_named_without_a_traceback(tmp_path, capsys):
    finished_run(tmp_path / "run", "model.vision.qk_norm=true", "model.vision.pre_norm=false")
    words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "hugging_face"]
    assert main(words) == 2
    assert "CLIPModel has no qk-norm" in capsys.readouterr().err
    finished_run(tmp_path / "last", "model.text.pool=last")
    words[1] = str(tmp_path / "last")
    assert main(words) == 2
    assert "reads a caption at its first end-of-text token" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.pt"), str(tmp_path / "x.pt")]) == 2
    assert "none.pt" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_report_can_be_made_of_a_run_that_is_not_finished(tmp_path, capsys):
    finished_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Configuration" in page and "Held-out scores" not in page
