"""laclip evaluate MODEL zero-shot: real images, a small model that has learned them."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from scored_model import evaluate, refuse, write_folders, write_run, write_tar
from train_job import arguments, run

from laclip.cli import main
from laclip.evaluation.data import open_labelled, read_bytes
from laclip.evaluation.prompts import FOLDER
from laclip.evaluation.ranking import places
from laclip.evaluation.trained import TrainedModel
from laclip.evaluation.zero_shot import ClassSet

ROOT = Path(__file__).parent.parent
WNIDS = [line.split("\t") for line in (FOLDER / "imagenet_classes.tsv").read_text().splitlines()]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "fresh")


@pytest.fixture
def folders(drawings, tmp_path):
    return write_folders(tmp_path / "data", drawings)


def tars(path, drawings, names=True, split="test"):
    """CLIP_benchmark's layout: two tars, the labels of the class folders' order."""
    ordered = sorted(drawings, key=lambda name: name.replace(" ", "_"))
    members = {}
    for label, caption in enumerate(ordered):
        for key, image in drawings[caption].items():
            members |= {f"{key}.jpg": image, f"{key}.cls": str(label).encode()}
    items = list(members.items())
    write_tar(path / split / "0.tar", dict(items[:20]))
    write_tar(path / split / "1.tar", dict(items[20:]))
    (path / split / "nshards.txt").write_text("2\n")
    if names:
        (path / "classnames.txt").write_text("".join(f"{name}\n" for name in ordered))
    return path / split


def test_scores_and_classifier_equal_open_clips_on_the_exported_model(trained, folders, tmp_path):
    exported = [tmp_path / kind for kind in ("open_clip", "hugging_face")]
    for out in exported:
        assert main(["export", str(trained), str(out), "--format", out.name]) == 0
    command = [sys.executable, "requirements/oracles.py", "tests/oracles/zero_shot.py"]
    done = subprocess.run(
        [*command, *exported, folders],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    names = [folder.name.replace("_", " ") for folder in sorted(folders.iterdir())]
    for templates, count in (("simple", 7), ("openai", 80)):
        expected = json.loads(done.stdout)[templates]
        scores = evaluate(trained, "zero-shot", folders, "--templates", templates)
        assert scores["top1"] == expected["top1"] > 5 * scores["chance"]
        assert scores["top5"] == expected["top5"]
        lines = (FOLDER / f"templates_{templates}.txt").read_text().splitlines()
        classes = ClassSet(folders, templates=templates)
        ours = classes.encode(partial(TrainedModel(trained).encode_texts, label="prompts"))
        assert classes.names == names and classes.templates == lines
        assert len(lines) == count
        assert (ours - torch.tensor(expected["classifier"])).abs().max() < 2e-6
    assert json.loads(done.stdout)["hugging_face"] < 2e-3  # of a probability; it resizes in torch


def test_a_run_scores_classes_as_the_command_does(folders, tmp_path):
    next(folders.glob("*/*.jpg")).write_bytes(b"no image")
    task = f'evaluation.tasks={{classes={{data="{folders}",direction="zero_shot"}}}}'
    _, out = run(arguments(tmp_path / "run", "train.steps=4", task, stage=3), ranks=2)
    assert "zero-shot, top-1" in out
    found = json.loads((tmp_path / "run" / "scores.json").read_text())["classes"]
    expected = evaluate(tmp_path / "run", "zero-shot", folders)
    assert found == {key: expected[key] for key in found} and found["undecodable"] == 1
    assert {"top1", "top5", "mean_per_class", "chance", "n", "undecodable"} == found.keys()
    examples = json.loads((tmp_path / "run" / "examples.json").read_text())["classes"]
    names = [folder.name.replace("_", " ") for folder in folders.iterdir()]
    assert all(example["caption"] in names for example in examples)
    assert "zero-shot, top-1" in (tmp_path / "run" / "report.html").read_text()


def test_tars_of_clip_benchmark_score_as_the_folders(trained, drawings, folders, tmp_path):
    data = tars(tmp_path / "wds", drawings)
    templates = data.parent / "zeroshot_classification_templates.txt"
    lines = (FOLDER / "templates_simple.txt").read_text()
    templates.write_text(lines.replace("{}", "{c}"))
    expected = evaluate(trained, "zero-shot", folders)
    found = evaluate(trained, "zero-shot", data)
    assert found["templates"] == str(templates)
    assert found["classnames"] == str(data.parent / "classnames.txt")
    for key in ("top1", "top5", "mean_per_class", "per_class", "n", "chance", "classes"):
        assert found[key] == expected[key]


def test_mean_per_class_weighs_classes_not_images(trained, drawings, folders):
    before = evaluate(trained, "zero-shot", folders)
    right = next(entry["class"] for entry in before["per_class"] if entry["top1"] == 1)
    image = next(iter(drawings[right].values()))
    for number in range(50):
        (folders / right.replace(" ", "_") / f"{number}.jpg").write_bytes(image)
    after = evaluate(trained, "zero-shot", folders)
    assert after["n"] == before["n"] + 50
    assert after["top1"] > before["top1"]
    assert after["mean_per_class"] == pytest.approx(before["mean_per_class"])


def test_classes_of_fewer_images_count_only_where_they_have_some(trained, drawings, tmp_path):
    data = tars(tmp_path / "wds", drawings)
    (data.parent / "classnames.txt").open("a").write("a class without images\nanother one\n")
    scores = evaluate(trained, "zero-shot", data)
    assert scores["classes"] == 26 and len(scores["per_class"]) == 24
    assert scores["chance"] == 1 / 26


@pytest.mark.parametrize("count", [3, 1000])
def test_imagenets_folders_get_its_names(fresh, drawings, count, tmp_path):
    image = next(iter(next(iter(drawings.values())).values()))
    chosen = WNIDS if count == 1000 else [WNIDS[i] for i in (2, 500, 999)]
    for wnid, _ in chosen:
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "ILSVRC2012_val_00000001.JPEG").write_bytes(image)
    # As some copies of ImageNet have it; not in our form, and not needed.
    (tmp_path / "val" / "classnames.txt").write_text("n01440764 tench\n")
    template = tmp_path / "one.txt"
    template.write_text("{}\n")
    scores = evaluate(fresh, "zero-shot", tmp_path / "val", "--templates", template)
    assert [entry["class"] for entry in scores["per_class"]] == [name for _, name in chosen]
    assert scores["classnames"] == "ImageNet's" and scores["n"] == count
    # One image everywhere: one class is right, twice if its name is of two classes.
    assert scores["top1"] * count == pytest.approx(1)


def test_the_names_belong_to_imagenets_classes():
    names = dict(WNIDS)
    assert len(names) == 1000 and list(names) == sorted(names)
    assert names["n01440764"] == "tench" and names["n15075141"] == "toilet paper"
    assert names["n02012849"] == "crane bird" and names["n03126707"] == "construction crane"
    # Two pairs have one name each in open_clip's list.
    assert len(set(names.values())) == 998


def test_images_that_do_not_decode_are_counted_and_named(trained, drawings, folders, capsys):
    expected = evaluate(trained, "zero-shot", folders)
    first, second = sorted(folders.iterdir())[:2]
    whole = next(iter(drawings[first.name.replace("_", " ")].values()))
    (first / "a_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (first / "b_empty.jpg").write_bytes(b"")
    (second / "c_text.png").write_text("no image at all")
    (second / "d_moving.gif").write_bytes(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;")
    (second / "e_\udce9.jpg").write_text("a name in Latin-1")
    (second / "notes.txt").write_text("not meant to be an image")
    (second / ".copies").mkdir()
    (second / ".copies" / "whole.jpg").write_bytes(whole)
    capsys.readouterr()
    scores = evaluate(trained, "zero-shot", folders)
    broken = {
        f"{first.name}/a_cut.jpg", f"{first.name}/b_empty.jpg", f"{second.name}/c_text.png",
        f"{second.name}/d_moving.gif", f"{second.name}/e_\udce9.jpg",
    }  # fmt: skip
    assert set(scores["undecodable_images"]) == broken and scores["undecodable"] == 5
    assert "header" in scores["undecodable_images"][f"{second.name}/c_text.png"]
    assert scores["ignored_files"] == [f"{second.name}/notes.txt"]
    for key in ("top1", "top5", "mean_per_class", "n"):
        assert scores[key] == expected[key]
    printed = capsys.readouterr().out
    assert "a_cut.jpg" in printed and "notes.txt" in printed and r"e_\udce9.jpg" in printed


def test_what_cannot_be_read_is_no_image_that_does_not_decode(drawings, tmp_path, monkeypatch):
    images = open_labelled(tars(tmp_path / "tars", drawings))
    path, offset, count = images.places[0]
    assert len(images.read(0)) == count
    os.truncate(path, offset + count // 2)
    with pytest.raises(ValueError, match=f"'{re.escape(str(path))}' has become shorter"):
        images.read(0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        images.read(0)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(OSError, match="Input/output error: '/proc/self/mem'"):
        read_bytes(Path("/proc/self/mem"), 0, 16)  # nothing is mapped there
    assert len(pauses) == 4


def test_folders_named_by_numbers_follow_the_numbers(trained, drawings, tmp_path):
    names = sorted(drawings)
    numbered = {str(i): drawings[name] for i, name in enumerate(names)}
    data = write_folders(tmp_path / "numbered", numbered)
    (tmp_path / "names.txt").write_text("\n".join(names))
    scores = evaluate(trained, "zero-shot", data, "--classnames", tmp_path / "names.txt")
    expected = evaluate(trained, "zero-shot", write_folders(tmp_path / "named", drawings))
    assert scores["top1"] == expected["top1"]


def test_imagenets_names_are_given_to_its_numbers(fresh, drawings, tmp_path, capsys):
    image = next(iter(next(iter(drawings.values())).values()))
    data = write_folders(tmp_path / "v2", {str(n): {"x": image} for n in range(1000)})
    message = refuse(capsys, fresh, "zero-shot", data)
    assert "its classes are numbers" in message and "or imagenet" in message
    (tmp_path / "one.txt").write_text("{}\n")
    words = ["--classnames", "imagenet", "--templates", tmp_path / "one.txt"]
    scores = evaluate(fresh, "zero-shot", data, *words)
    assert [entry["class"] for entry in scores["per_class"]] == [name for _, name in WNIDS]


def test_the_runs_precision_normalization_and_interpolation_are_used(trained, folders):
    expected = evaluate(trained, "zero-shot", folders)
    sizes = ["--set", "evaluation.batch_size=7", "data.decode_threads=1"]
    assert evaluate(trained, "zero-shot", folders, *sizes) == expected
    model = TrainedModel(trained, ["train.precision=bf16"])
    assert model.model.logit_scale.dtype == torch.float32
    rounded = model.encode_texts(["a"], "")
    assert torch.equal(rounded, rounded.bfloat16().float())
    for change in ("data.normalize=imagenet", "data.interpolation=linear"):
        images = [
            TrainedModel(trained, more).encode_images(open_labelled(folders), "")[0]
            for more in ([], [change])
        ]
        assert not torch.equal(*images)


def test_weights_that_are_not_numbers_are_refused(fresh, folders, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.toml").write_text((fresh / "config.toml").read_text())
    state = torch.load(fresh / "model.pt", weights_only=True)
    state["image.norm.weight"][0] = float("nan")
    torch.save(state, broken / "model.pt")
    assert "not finite" in refuse(capsys, broken, "zero-shot", folders)


def no_such_folder(data):
    return data / "nowhere"


def empty_class(data):
    (data / "zebra_class").mkdir()
    return data


def no_folders(data):
    (data.parent / "bare").mkdir()
    return data.parent / "bare"


def one_folder_too_high(data):
    (data.parent / "set").mkdir()
    data.rename(data.parent / "set" / "val")
    return data.parent / "set"


def one_class(data):
    (data.parent / "set").mkdir()
    next(data.iterdir()).rename(data.parent / "set" / "robot")
    return data.parent / "set"


def unknown_wnid(data):
    for folder, wnid in zip(list(data.iterdir()), [WNIDS[0][0], "n99999999"]):
        folder.rename(data.parent / wnid)
    (data.parent / "wnids").mkdir()
    for wnid in (WNIDS[0][0], "n99999999"):
        (data.parent / wnid).rename(data.parent / "wnids" / wnid)
    return data.parent / "wnids"


def names_of_another_set(data):
    (data / "classnames.txt").write_text("one\ntwo\n")
    return data


def names_in_another_order(data):
    names = sorted(folder.name.replace("_", " ").title() for folder in data.iterdir())
    names[1:3] = reversed(names[1:3])
    (data.parent / "classnames.txt").write_text("\n".join(names))
    return data


def nothing_decodes(data):
    for file in data.rglob("*.jpg"):
        file.write_bytes(b"broken")
    return data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_such_folder, "nowhere': there is no such folder"),
        (empty_class, "zebra_class': found no image"),
        (no_folders, "found neither folders nor tars"),
        (one_folder_too_high, "val': found 24 folders of images and no image beside them"),
        (one_class, "has one class, 'robot', expected at least two"),
        (unknown_wnid, "1 of its 2 folders are WordNet ids that ImageNet-1k does not have: n99999"),
        (names_of_another_set, "names 2 classes, '"),
        (names_in_another_order, "' line 2: '"),
        (nothing_decodes, "none of its 48 images decodes"),
    ],
)
def test_folders_that_cannot_be_scored_are_refused(fresh, folders, damage, message, capsys):
    assert message in refuse(capsys, fresh, "zero-shot", damage(folders))


def test_tars_that_cannot_be_scored_are_refused(fresh, drawings, tmp_path, capsys):
    def told(data):
        return refuse(capsys, fresh, "zero-shot", data)

    data = tars(tmp_path / "a", drawings, names=False)
    assert "found no classnames.txt" in told(data)
    assert f"Name one of them: {data}" in told(data.parent)
    (data.parent / "classnames.txt").write_text("one\ntwo\n")
    message = told(data)
    assert "is of class 23" in message and "names 2 classes, 0 to 1" in message
    (data / "nshards.txt").write_text("3\n")
    assert "found 2 tars" in told(data)
    data = tars(tmp_path / "b", drawings)
    content = (data / "1.tar").read_bytes()
    with tarfile.open(data / "1.tar") as tar:
        *_, last = tar
    for size in (last.offset, last.offset_data - 100, last.offset - 100):
        (data / "1.tar").write_bytes(content[:size])
        assert "1.tar" in (message := told(data)) and "Download it again" in message
        (data / "1.tar").write_bytes(content)
    write_tar(data / "1.tar", {"x.jpg": b"image", "x.txt": b"a caption"})
    assert "'x' has no .cls" in told(data)
    write_tar(data / "1.tar", {"x.jpg": b"image", "x.png": b"its mask", "x.cls": b"0"})
    assert "'x' has two images" in told(data)
    write_tar(data / "1.tar", {"x.jpg": b"image", "x.cls": b"zebra"})
    assert "holds 'zebra', expected a class's number" in told(data)


def test_templates_and_models_that_cannot_be_used_are_refused(fresh, folders, tmp_path, capsys):
    def told(model, *words):
        return refuse(capsys, model, "zero-shot", folders, *words)

    (tmp_path / "templates.txt").write_text("a photo of a {}.\na photo\n")
    message = told(fresh, "--templates", tmp_path / "templates.txt")
    assert "line 2: 'a photo' has no place for the class's name" in message
    (tmp_path / "templates.txt").write_bytes(b"a photo of a {} \xff")
    assert "templates.txt' is not UTF-8" in told(fresh, "--templates", tmp_path / "templates.txt")
    (tmp_path / "templates.txt").write_text("a photo of a {}\n\na {}\n")
    assert "line 2 is empty" in told(fresh, "--templates", tmp_path / "templates.txt")
    assert "'nothing': there is no such file" in told(fresh, "--templates", "nothing")
    assert "no such file" in told(fresh, "--classnames", tmp_path / "names.txt")
    assert "holds no config.toml, expected the folder of a run" in told(tmp_path)
    assert "--out: there is no folder" in told(fresh, "--out", tmp_path / "no" / "scores.json")
    assert "is a folder, expected a file's name" in told(fresh, "--out", tmp_path)
    assert "--out: '/proc/x' cannot be written" in told(fresh, "--out", "/proc/x")
    if not torch.cuda.is_available():
        assert "Add --set model.attention=sdpa" in told(fresh, "--set", "model.attention=xformers")
    assert "model.embed_dim" in told(fresh, "--set", "model.embed_dimm=3")


def test_places_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (40, 3), generator=generator).float()  # many ties
    candidates = torch.randint(-2, 3, (30, 3), generator=generator).float()
    drawn = torch.rand(40, 30, generator=generator) < 0.08
    pairs = drawn.nonzero()
    expected = []
    for query in drawn.any(dim=1).nonzero()[:, 0].tolist():
        order = (queries[query] @ candidates.T).sort(descending=True, stable=True).indices
        own = drawn[query][order].int()
        expected.append(int(own.argmax()))
    mixed = pairs[torch.randperm(len(pairs), generator=generator)]
    for block in (1, 100, 10**6):
        found = places(queries, candidates, mixed, torch.device("cpu"), block)
        assert found.tolist() == expected


def test_similarities_that_are_not_numbers_are_no_hits():
    queries = torch.tensor([[float("nan")], [1.0]])
    pairs = torch.tensor([[0, 0], [1, 1]])
    found = places(queries, torch.tensor([[1.0], [2.0]]), pairs, torch.device("cpu"))
    assert found.tolist() == [1, 0]
