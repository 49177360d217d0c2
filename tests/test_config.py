"""The configuration: what is read, what is refused, what comes back."""

import dataclasses
import json
import re
import textwrap

import pytest
import torch
from train_job import ROOT

from laclip.config import PRESETS, Config, differences, load_config
from laclip.engine_settings import engine_settings
from laclip.parallel import Ranks
from laclip.typed_toml import dump, flatten


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
    path.write_text(dump(config))
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
        ("optimizer.lr=nan", "optimizer.lr: expected 0 to "),
        ("optimizer.end_lr=-1", "optimizer.end_lr: expected 0 to "),
        ("optimizer.lr=5e-6", "optimizer.end_lr: 1e-05 is above optimizer.lr, 5e-06"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas: expected 0 to 1, found 2.0"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay: expected 0 to "),
        ("optimizer.layer_decay=0", "optimizer.layer_decay: must be above 0"),
        ("train.micro_batch_size=-1", "train.micro_batch_size: expected 0 to "),
        ("train.epochs=inf", "train.epochs: expected 0 to "),
        ("train.label_smoothing=1.5", "train.label_smoothing: expected 0 to 1"),
        ("run.seed=-1", "run.seed: expected 0 to "),
        ("run.seed=18446744073709551616", "run.seed: expected 0 to "),
        ("run.timeout_minutes=inf", "run.timeout_minutes: expected 0 to 1e+06"),
        ("data.max_bad_fraction=nan", "data.max_bad_fraction: expected 0 to 1"),
        ("data.crop_scale=[0, 1]", "data.crop_scale: must be above 0"),
        ("checkpoint.every_minutes=-1", "checkpoint.every_minutes: expected 0 to "),
        ("model.init_logit_scale=14.3", "model.init_logit_scale: expected -100 to 5, found 14.3"),
        ("model.vision.heads=0", "model.vision.heads: must be above 0"),
        ("model.text.depth=0", "model.text.depth: must be above 0"),
        ("model.text.pool=mean", "model.text.pool: 'mean' is not a choice; there are: eot, last"),
        ("model.text.mlp_ratio=-1", "model.text.mlp_ratio: must be above 0"),
    ],
)
def test_a_mistake_is_named_with_its_key(override, message):
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert message in str(error.value)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"data\.weights: expected 0 to .*, found nan"):
        load_config(None, ["data.captions=weights", "data.weights=[nan, 1]"])


def test_the_edges_of_ranges_are_taken():
    edges = ["run.seed=9223372036854775807", "model.init_logit_scale=-10", "optimizer.eps=0"]
    edges += ["optimizer.start_lr=0", "optimizer.end_lr=1e-3", "optimizer.betas=[0, 0.999]"]
    assert load_config(None, edges).run.seed == 2**63 - 1


def test_the_home_folder_is_meant_by_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(None, ["run.folder=~/runs/a", "data.train=[~/data, ./~]"])
    assert config.run.folder == "/home/me/runs/a"
    assert config.data.train == ("/home/me/data", "./~")


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
    for content in (b"[train\n", b'[run]\nfolder = "\xe9"\n'):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.toml: not valid TOML"):
            load_config(broken)


def test_differences_leave_out_what_does_not_change_the_run():
    old = load_config(None)
    new = load_config(None, ["optimizer.lr=1", "data.prefetch=5", "evaluation.tasks.a.data=x"])
    assert differences(old, new) == ["optimizer.lr: 0.001 -> 1.0"]
    assert differences(old, old) == []


RANK = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object with"),
        ({"zero_optimization": True}, "expected an object with"),
        ({"zero_optimization": {"stage": "2"}}, "expected an object with"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"bfloat16": {"enabled": True}}, "bfloat16.enabled is True, but train.precision"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is True, but"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown: DeepSpeed's timers fail"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler: DeepSpeed's timers fail"),
    ],
)
def test_a_json_that_would_not_do_what_it_says_is_refused(content, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        engine_settings(path, Config(), RANK)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_json_as_hugging_face_writes_it_is_completed(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": 1e9}
    rest = {"bf16": {"enabled": "auto"}, "train_batch_size": "auto", "wall_clock_breakdown": False}
    path.write_text(json.dumps({"zero_optimization": zero, **rest}))
    settings = engine_settings(path, Config(), RANK)
    assert settings["zero_optimization"] == {"stage": 3, "sub_group_size": 1e9}
    assert settings["train_batch_size"] == Config().train.global_batch_size


def test_the_documents_name_keys_that_exist():
    known = set(flatten(Config())) | {"model.text", "model.vision", "evaluation.tasks"}
    sections = "|".join(field.name for field in dataclasses.fields(Config))
    for path in {ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs/library.md"}:
        for key in re.findall(rf"\b(?:{sections})\.[a-z_]+(?:\.[a-z_]+)?\b", path.read_text()):
            is_file = key.endswith((".py", ".md", ".pt"))
            assert is_file or key in known or key.startswith("evaluation.tasks."), (path, key)


def test_the_configuration_with_defaults_of_open_clip_is_one(tmp_path):
    text = (ROOT / "docs" / "from_open_clip.md").read_text()
    block = re.search(r"\n\n((?:    .*\n|\n)+)\n## Options", text)[1]
    (tmp_path / "open_clip.toml").write_text(textwrap.dedent(block))
    config = load_config(tmp_path / "open_clip.toml")
    assert config.optimizer.eps == 1e-6 and config.data.crop_scale == (0.9, 1.0)
