"""laclip import, export and report on a run's folder."""

import dataclasses
import json
import resource

import pytest
import torch

from laclip.cli import main
from laclip.config import load_config
from laclip.convert import from_laclip
from laclip.import_weights import model_section
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
    model = build_model(config.model, 49408, 49407, siglip=config.train.loss == "siglip")
    torch.save(model.state_dict(), folder / "model.pt")
    return model


LACLIPS_FAMILY = [
    *("model.vision.qk_norm=true", "model.vision.pre_norm=false", "model.vision.patch_bias=true"),
    *("model.vision.layer_norm_eps=1e-6", "model.text.activation=quick_gelu"),
]
TOLD = [  # by a configuration, not by weights
    *("model.vision.activation=quick_gelu", "model.text.activation=quick_gelu"),
    *("model.vision.heads=2", "model.text.heads=4", "model.text.layer_norm_eps=1e-6"),
]
LINEAR = ["data.normalize=inception", "data.interpolation=linear"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("open_clip", []),
        ("open_clip", [*TOLD, "model.text.pool=last", "train.loss=siglip", *LINEAR]),
        ("open_clip", LACLIPS_FAMILY),
        ("laclip_release", [*LACLIPS_FAMILY, "data.normalize=imagenet", LINEAR[1]]),
        ("hugging_face", [*TOLD, *LINEAR]),
    ],
)
def test_an_exported_model_comes_back_bit_for_bit(kind, settings, tmp_path, capsys):
    model = finished_run(tmp_path / "run", *settings)
    out, back = tmp_path / "new" / "out", tmp_path / "other" / "back.pt"
    assert main(["export", str(tmp_path / "run"), str(out), "--format", kind]) == 0
    capsys.readouterr()
    assert main(["import", str(out), str(back)]) == 0
    told, _, section = capsys.readouterr().out.partition("\n\n")
    assert f"from {kind}" in told
    state = torch.load(back, weights_only=True)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    (tmp_path / "back.toml").write_text(section)
    found = load_config(tmp_path / "back.toml")
    expected = load_config(tmp_path / "run" / "config.toml")
    assert found.train == expected.train and found.data == expected.data
    expected = expected.model
    if kind == "open_clip" and settings == LACLIPS_FAMILY:  # which open_clip has no settings for
        expected = dataclasses.replace(
            expected, text=dataclasses.replace(expected.text, activation="gelu")
        )
    assert found.model == dataclasses.replace(expected, weights=str(back))


@pytest.mark.parametrize("preset", ["vit_b_16", "vit_h_14", "laclip_vit_s_16", "laclip_vit_l_16"])
def test_a_lone_image_tower_gets_its_number_of_heads(preset, tmp_path):
    config = load_config(None, [f"model.preset={preset}"]).model
    with torch.device("meta"):
        state = build_model(config, 100, 99).state_dict()
    section = model_section({n: t for n, t in state.items() if n.startswith("image.")}, {})
    (tmp_path / "run.toml").write_text(f"[model]\n{section}")
    found = load_config(tmp_path / "run.toml").model
    assert (found.vision, found.embed_dim) == (config.vision, config.embed_dim)


def test_an_import_names_the_preset_and_what_weights_do_not_tell(tmp_path, capsys):
    model = build_model(load_config(None, ["model.preset=vit_b_32"]).model, 100, 99)
    torch.save(from_laclip(model.state_dict(), "open_clip"), tmp_path / "theirs.pt")
    assert main(["import", str(tmp_path / "theirs.pt"), str(tmp_path / "w.pt")]) == 0
    out = capsys.readouterr().out
    assert 'preset = "vit_b_32"\n# Weights alone do not tell the activation' in out
    assert "width" not in out and "heads" not in out
    words = ["import", str(tmp_path / "theirs.pt"), str(tmp_path / "i.pt"), "--tower", "image"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert (
        "embed_dim = 512\n\n[model.vision]\npatch_size = 32\n# Weights" in out
        and "\n[model.text]" not in out
    )


@pytest.mark.parametrize(
    ("file", "change", "lines"),
    [
        (
            "open_clip_config.json",
            {"std": [1, 1, 1], "interpolation": "random", "resize_mode": "squash"},
            [
                "# mean [0.48145466, 0.4578275, 0.40821073], deviation [1, 1, 1]: normalize has",
                "# interpolation 'random': laclip has cubic and linear alone",
                "# resize_mode 'squash': laclip resizes the shorter side to the model's size",
            ],
        ),
        (  # as transformers 5 writes it
            "processor_config.json",
            {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": 36},
            ['normalize = "imagenet"', "# size 36, crop_size {'height': 32, 'width': 32}: laclip"],
        ),
        (  # one number for all channels; the image squashed to a square
            "processor_config.json",
            {"image_mean": 0.5, "image_std": 0.5, "size": {"height": 3}, "crop_size": None},
            ['normalize = "inception"', "# size {'height': 3}, crop_size None: laclip resizes"],
        ),
    ],
)
def test_an_import_tells_which_images_the_model_takes(file, change, lines, tmp_path, capsys):
    finished_run(tmp_path / "run")
    out = tmp_path / "theirs"
    kind = "open_clip" if "open_clip" in file else "hugging_face"
    assert main(["export", str(tmp_path / "run"), str(out), "--format", kind]) == 0
    images = out / "preprocessor_config.json"
    words = ["import", str(out), str(tmp_path / "w.pt")]
    if kind == "hugging_face":
        (out / file).write_text(json.dumps({"image_processor": json.loads(images.read_text())}))
        images.unlink()
    content = json.loads((out / file).read_text())
    told = content["preprocess_cfg" if kind == "open_clip" else "image_processor"]
    told |= change
    (out / file).write_text(json.dumps(content))
    capsys.readouterr()
    assert main(words) == 0
    found = capsys.readouterr().out.partition("\n[data]\n")[2].splitlines()
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines)), found
    told |= dict.fromkeys(("mean", "image_mean"), ("black", "white"))
    (out / file).write_text(json.dumps(content))
    assert main(words) == 2 and f"{file}' is no configuration of" in capsys.readouterr().err
    (out / file).unlink()
    assert main(words) == 0
    assert "# Nothing here tells the images' mean and deviation" in capsys.readouterr().out
    assert main([*words, "--tower", "text"]) == 0
    assert "deviation" not in capsys.readouterr().out


def test_a_model_that_reads_other_tokens_is_refused(tmp_path, capsys):
    finished_run(tmp_path / "run")
    out = tmp_path / "theirs"
    assert main(["export", str(tmp_path / "run"), str(out), "--format", "open_clip"]) == 0
    settings = json.loads((out / "open_clip_config.json").read_text())
    settings["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    (out / "open_clip_config.json").write_text(json.dumps(settings))
    assert main(["import", str(out), str(tmp_path / "back.pt")]) == 2
    assert "found pool_type 'avg', expected 'tok': " in capsys.readouterr().err
    (out / "open_clip_config.json").write_text("{}")
    assert main(["import", str(out), str(tmp_path / "back.pt")]) == 2
    assert "is no configuration of open_clip (KeyError('model_cfg'))" in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_finds_no_room_leaves_nothing(there, tmp_path, capsys):
    """As a full disk, a limit on the size of files fails in the midst of a write."""
    finished_run(tmp_path / "run")
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "config.json").write_text("old")
        (out / "README.md").write_text("kept")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = ["export", str(tmp_path / "run"), str(out), "--format", "hugging_face"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1 << 16, 1 << 21):  # too small for the vocabulary, and for the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert main(words) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(out) in capsys.readouterr().err.replace("/.out", "/out")
        assert out.exists() == there
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (out / ".laclip.tmp" if there else tmp_path / ".out.tmp").mkdir()  # as one that was killed
    assert main(words) == 0
    names = {path.name for path in out.iterdir()}
    assert names > {"pytorch_model.bin", "merges.txt"} and not any(n[0] == "." for n in names)
    assert ("README.md" in names) == there and "hidden_size" in (out / "config.json").read_text()


def test_mistakes_are_named_without_a_traceback(tmp_path, capsys):
    finished_run(tmp_path / "run", "model.vision.qk_norm=true", "model.vision.pre_norm=false")
    words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "hugging_face"]
    assert main(words) == 2
    assert "CLIPModel has no qk-norm" in capsys.readouterr().err
    finished_run(tmp_path / "last", "model.text.pool=last")
    words[1] = str(tmp_path / "last")
    assert main(words) == 2
    assert "reads a caption at its first end-of-text token" in capsys.readouterr().err
    words[-1] = "open_clip"
    (tmp_path / "out").mkdir()
    other = tmp_path / "out" / "open_clip_model.safetensors"
    other.touch()
    assert main(words) == 2
    assert f"'{other}' would be loaded from there" in capsys.readouterr().err
    other.unlink()
    (tmp_path / "out").rmdir()
    (tmp_path / "out").touch()
    assert main(words) == 2
    assert "is a file, expected a folder to write" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.pt"), str(tmp_path / "x.pt")]) == 2
    assert "none.pt" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_report_can_be_made_of_a_run_that_is_not_finished(tmp_path, capsys):
    finished_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Configuration" in page and "Held-out scores" not in page
