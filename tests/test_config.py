"""The configuration: what is read, what is refused, what comes back."""

import dataclasses
import re
import textwrap

import pytest
from train_job import ROOT

from laclip.config import PRESETS, Config, differences, dump_config, flatten, load_config


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    overrides = [
        "model.preset=laclip_vit_b_16",
        "data.train=['a', \"b's\"]",
        "run.folder='with \"quotes\" and \\ slash'",
        'evaluation.tasks={"flickr30k.test"={}, "with \\"quotes\\", spaces"={}, "é"={}}',
        "evaluation.tasks.first.data=somewhere",
        "evaluation.tasks.second.direction=text_to_image",
        "log.wandb_project='two\\nlines'",
        "optimizer.betas=[0.9, 0.95]",
        "train.epochs=3",
    ]
    config = load_config(None, overrides)
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_a_list_whose_quotes_a_remote_shell_took_is_read_all_the_same():
    train = load_config(None, ["data.train=[/data/a, /data/b-2]"]).data.train
    assert train == ("/data/a", "/data/b-2")


def test_the_file_overrides_the_defaults_and_set_overrides_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[optimizer]\nlr = 1\nweight_decay = 0.1\n")
    config = load_config(path, ["optimizer.lr=0.25"])
    assert config.optimizer.lr == 0.25
    assert config.optimizer.weight_decay == 0.1
    assert config.optimizer.eps == Config().optimizer.eps


def test_a_preset_fills_only_what_is_not_given():
    config = load_config(None, ["model.preset=laclip_vit_s_16", "model.vision.depth=2"])
    assert config.model.vision.depth == 2
    assert config.model.vision.width == PRESETS["laclip_vit_s_16"]["vision"]["width"]
    assert config.model.vision.qk_norm


def test_a_preset_that_the_file_would_silently_outvote_is_refused(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[model.vision]\nwidth = 192\nheads = 12\npatch_dropout = 0.5\n")
    with pytest.raises(
        ValueError, match=r"preset=vit_b_32: .*c\.toml gives model\.vision\.width i"
    ):
        load_config(path, ["model.preset=vit_b_32"])
    config = load_config(path, ["model.vision.width=240", "model.preset=vit_b_32"])
    assert config.model.vision.width == 240 and config.model.vision.patch_dropout == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "unknown section 'optimiser'; did you mean 'optimizer'"),
        ("optimizer.leraning_rate=1", "unknown key 'optimizer.leraning_rate'"),
        ("optimizer.weigth_decay=1", "did you mean 'weight_decay'"),
        ("optimizer.lr=fast", "optimizer.lr: expected float, found 'fast'"),
        ("train.steps=1.5", "train.steps: expected int, found 1.5"),
        ("train.steps=true", "train.steps: expected int, found True"),
        ("data.flip=1", "data.flip: expected bool, found 1"),
        ("data.captions=unifrom", "'unifrom' is not a choice; did you mean 'uniform'"),
        ("data.crop_scale=[0.5]", "data.crop_scale: expected 2 values, found 1"),
        ("data.crop_scale=[0.9, 0.5]", "expected 0 < low <= high <= 1"),
        ("data.captions=weights", "data.weights"),
        ("data.weights=[1.0]", "only read with data.captions = 'weights'"),
        ("model.preset=vit_b_23", "did you mean 'vit_b_32'"),
        ("model=3", "model: expected a section, found 3"),
        ("evaluation.tasks.a.direction=up", "evaluation.tasks.a.direction: 'up'"),
        ("evaluation.tasks.a.direction=zero-shot", "did you mean 'zero_shot'"),
        ("evaluation.tasks.a.templates=simple", "templates: only read with direction"),
        ("train.global_batch_size=0", "must be above 0, found 0"),
        ("train.max_skipped_steps=0", "must be above 0, found 0"),
        ("lr", "expected section.key=value"),
    ],
)
def test_a_mistake_is_named_with_its_key(override, message):
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert message in str(error.value)


def test_smoothing_that_the_sigmoid_loss_would_not_read_is_refused():
    with pytest.raises(ValueError, match="label_smoothing: only read with train.loss = 'clip'"):
        load_config(None, ["train.loss=siglip", "train.label_smoothing=0.1"])


def test_epochs_and_steps_exclude_each_other():
    with pytest.raises(ValueError, match="give one of the two"):
        load_config(None, ["train.epochs=1", "train.steps=10"])


def test_a_missing_file_and_broken_toml_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(ValueError, match=r"broken\.toml: not valid TOML"):
        load_config(broken)


def test_differences_leave_out_what_does_not_change_the_run():
    old = load_config(None)
    new = load_config(None, ["optimizer.lr=1", "data.prefetch=5", "evaluation.tasks.a.data=x"])
    assert differences(old, new) == ["optimizer.lr: 0.001 -> 1.0"]
    assert differences(old, old) == []


def test_the_documents_name_keys_that_exist():
    known = set(flatten(Config())) | {"model.text", "model.vision", "evaluation.tasks"}
    sections = "|".join(field.name for field in dataclasses.fields(Config))
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for key in re.findall(rf"\b(?:{sections})\.[a-z_]+(?:\.[a-z_]+)?\b", path.read_text()):
            is_file = key.endswith((".py", ".md", ".pt"))
            assert is_file or key in known or key.startswith("evaluation.tasks."), (path, key)


def test_the_configuration_with_defaults_of_open_clip_is_one(tmp_path):
    text = (ROOT / "docs" / "from_open_clip.md").read_text()
    block = re.search(r"\n\n((?:    .*\n|\n)+)\n## Options", text)[1]
    (tmp_path / "open_clip.toml").write_text(textwrap.dedent(block))
    config = load_config(tmp_path / "open_clip.toml")
    assert config.optimizer.eps == 1e-6 and config.data.crop_scale == (0.9, 1.0)
