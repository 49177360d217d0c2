"""laclip evaluate MODEL linear-probe and few-shot."""

import math

import pytest
import torch
from scored_model import EMOJI, evaluate, read_tar, refuse, write_folders, write_tar

from laclip.evaluation import probe
from laclip.evaluation.data import open_labelled
from laclip.evaluation.trained import TrainedModel


@pytest.fixture(scope="module")
def families():
    """Men, women and persons, 60 drawings each: {word: {key: JPEG}}."""
    members = {}
    for path in sorted((EMOJI / "train").glob("*.tar")):
        members |= read_tar(path)
    found = {}
    for name, content in sorted(members.items()):
        word = content.decode().partition(" ")[0] if name.endswith(".txt") else ""
        own = found.setdefault(word, {}) if word in ("man", "woman", "person") else {}
        if len(own) < 60:
            own[name[:-4]] = members[name[:-4] + ".jpg"]
    return found


@pytest.fixture(scope="module")
def halves(families, tmp_path_factory):
    """Two thirds of the drawings as training folders, the others as test folders."""
    folder = tmp_path_factory.mktemp("families")
    for name, kept in (("train", (0, 1)), ("test", (2,))):
        part = {
            word: {key: image for n, (key, image) in enumerate(own.items()) if n % 3 in kept}
            for word, own in families.items()
        }
        write_folders(folder / name, part)
    return folder / "train", folder / "test"


@pytest.fixture(scope="module")
def scored(trained, halves):
    return evaluate(trained, "linear-probe", *halves)


def draw(count=200, dim=12, classes=4):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, dim, generator=generator, dtype=torch.float64) + 3
    noise = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    teacher = torch.randn(dim, classes, generator=generator, dtype=torch.float64)
    return features, ((features - 3) @ teacher + 2 * noise).argmax(dim=1)


@pytest.mark.parametrize("c", [1e-5, 1e-2, 1.0, 100.0])
def test_the_gradient_vanishes_at_the_fit(c):
    """The objective is convex: where its gradient is zero it is smallest."""
    features, labels = draw()
    weight, bias, converged = probe.fit(features, labels, 4, c)
    assert converged

    def gradient(weight, bias):
        excess = (features @ weight.T + bias).softmax(dim=1)
        excess[torch.arange(len(labels)), labels] -= 1
        # scikit-learn's objective over c times the number of samples.
        of_weight = excess.T @ features / len(labels) + weight / (c * len(labels))
        return max(of_weight.abs().max(), excess.mean(dim=0).abs().max())

    # scikit-learn stops there.
    assert gradient(weight, bias) < 1e-4 < 0.01 * gradient(torch.zeros_like(weight), 0)


def test_blocks_starts_and_half_the_precision_lead_to_the_same_fit(monkeypatch):
    features, labels = draw()
    weight, bias, _ = probe.fit(features, labels, 4, 1.0)
    start = torch.ones(4, 12, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    monkeypatch.setattr(probe, "BLOCK_NUMBERS", 100)
    for found in (
        probe.fit(features, labels, 4, 1.0),
        probe.fit(features, labels, 4, 1.0, start),
        probe.fit(features.float(), labels, 4, 1.0),
    ):
        # The bias is free up to a constant.
        assert torch.allclose(found[0].double(), weight, atol=1e-3)
        assert torch.allclose(found[1].double() - found[1].mean(), bias - bias.mean(), atol=3e-3)
        logits = probe.predict(features, found[0], found[1])
        assert (
            logits.softmax(1) - probe.predict(features, weight, bias).softmax(1)
        ).abs().max() < 1e-3


def test_the_chosen_c_is_as_good_as_any_that_was_tried():
    features, labels = draw(400)
    noise = torch.Generator().manual_seed(1)
    labels = torch.where(torch.rand(400, generator=noise) < 0.3, labels.flip(0), labels)
    features = torch.cat([features, 5 * torch.randn(400, 80, generator=noise)], dim=1)
    found = probe.fit_best(features, labels, 4, torch.device("cpu"))
    held_out = probe._split(labels)
    accuracies = {}
    for exponent in (-6, -4, -2, 0, 2, 4, 6):
        weight, bias, _ = probe.fit(features[~held_out], labels[~held_out], 4, 10.0**exponent)
        hits = probe.predict(features[held_out], weight, bias).argmax(1) == labels[held_out]
        accuracies[exponent] = hits.double().mean().item()
    assert found["held_out_accuracy"] >= max(accuracies.values()) > accuracies[6]
    assert found["c"] < 1
    weight, bias, _ = probe.fit(features, labels, 4, found["c"])
    assert torch.allclose(found["weight"], weight)


def test_a_fifth_of_each_class_is_held_out_and_never_all_of_one():
    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 2 + [3])
    held_out = probe._split(labels)
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [10, 1, 1, 0]
    assert torch.equal(held_out, probe._split(labels))


def test_linear_probe_fits_features_before_the_projection(trained, halves, scored):
    train, test = halves
    scores = scored
    model = TrainedModel(trained)
    known, asked = open_labelled(train), open_labelled(test)
    features, _ = model.encode_images(known, "", projected=False)
    asked_features, _ = model.encode_images(asked, "", projected=False)
    assert features.shape == (120, 32)  # the tower's width; the embedding has 40
    weight, bias, _ = probe.fit(features.double(), torch.tensor(known.labels), 3, scores["c"])
    hits = probe.predict(asked_features, weight, bias).argmax(1) == torch.tensor(asked.labels)
    assert scores["top1"] == pytest.approx(hits.double().mean().item())
    assert scores["mean_per_class"] == pytest.approx(scores["top1"])  # as many images of each
    assert scores["n"] == 60 and scores["training"]["n"] == 120
    assert 0.4 < scores["top1"] <= 1 and scores["chance"] == pytest.approx(1 / 3)


def test_classes_of_the_test_set_are_matched_by_name(trained, halves, scored, tmp_path):
    train, test = halves
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "woman").symlink_to(test / "woman")
    scores = evaluate(trained, "linear-probe", train, tmp_path / "test")
    women = next(entry for entry in scored["per_class"] if entry["class"] == "woman")
    assert scores["per_class"] == [women] and scores["top1"] == women["top1"]


def test_linear_probe_takes_tars_and_leaves_out_what_is_broken(trained, halves, scored, tmp_path):
    for folder in halves:
        members = {}
        for label, own in enumerate(sorted(folder.iterdir())):
            for file in sorted(own.iterdir()):
                members[file.name] = file.read_bytes()
                members[f"{file.stem}.cls"] = f"{label}\n".encode()
        members |= {"broken.jpg": b"no image", "broken.cls": b"1"}
        write_tar(tmp_path / folder.name / "0.tar", members)
    scores = evaluate(trained, "linear-probe", tmp_path / "train", tmp_path / "test")
    assert list(scores["undecodable_images"]) == ["0.tar/broken"]
    assert list(scores["training"]["undecodable_images"]) == ["0.tar/broken"]
    for key in ("top1", "mean_per_class", "c", "n"):
        assert scores[key] == scored[key]


def test_few_shot_draws_episodes_from_the_seed_alone(trained, halves):
    train, _ = halves
    words = ["few-shot", train, "--ways", 3, "--episodes", 40]
    first = evaluate(trained, *words)
    assert evaluate(trained, *words) == first
    other = evaluate(trained, *words, "--seed", 1)
    assert other["top1"] != first["top1"]
    # Both estimate one mean: their difference has a standard error of interval / 1.96 x sqrt(2).
    spread = math.hypot(first["interval_95"], other["interval_95"]) / 1.96
    assert abs(other["top1"] - first["top1"]) < 4 * spread
    assert first["top1"] > first["chance"] + 2 * first["interval_95"]
    many = evaluate(trained, *words[:-1], 160)
    assert 0.4 < many["interval_95"] / first["interval_95"] < 0.65  # about half


def test_few_shot_never_asks_for_an_image_that_it_knows(trained, families, tmp_path):
    """With random classes, known images alone could lift the accuracy above chance."""
    images = [item for own in families.values() for item in own.items()]
    shuffled = [images[i] for i in torch.randperm(180, generator=torch.Generator().manual_seed(0))]
    drawn = {str(n): dict(shuffled[60 * n : 60 * n + 60]) for n in range(3)}
    data = write_folders(tmp_path / "random", drawn)
    scores = evaluate(trained, "few-shot", data, "--ways", 3, "--queries", 55, "--episodes", 60)
    assert abs(scores["top1"] - 1 / 3) < 0.06


def test_what_cannot_be_probed_is_refused(trained, halves, families, tmp_path, capsys):
    train, test = halves

    def told(*words):
        return refuse(capsys, trained, *words)

    (tmp_path / "robots").mkdir()
    (tmp_path / "robots" / "robot").symlink_to(test / "man")
    message = told("linear-probe", train, tmp_path / "robots")
    assert "1 of its classes have no image in" in message and "robot" in message
    image = next(iter(families["man"].values()))
    for name, labels in (("gap", (0, 2)), ("whole", (0, 1, 2))):
        members = {f"{n}.jpg": image for n in labels} | {f"{n}.cls": b"%d" % n for n in labels}
        write_tar(tmp_path / name / "0.tar", members)
    message = told("linear-probe", tmp_path / "gap", tmp_path / "whole")
    assert "1 of its classes have no image in" in message and ": 1. Give" in message
    single = write_folders(
        tmp_path / "single",
        {word: dict([next(iter(own.items()))]) for word, own in families.items()},
    )
    assert "none can be held out" in told("linear-probe", single, single)
    assert "has 3 classes, --ways asks for 5" in told("few-shot", train)
    message = told("few-shot", train, "--ways", 3, "--shots", 30)
    assert "fewer than 30 + 15 images" in message and "has 40" in message
    broken = {str(number): b"no image" for number in range(20)}
    data = write_folders(tmp_path / "broken", families | {"robot": broken})
    assert "'robot' has 0. Ask" in told("few-shot", data, "--ways", 3)
    assert "no image of class 'robot' decodes" in told("linear-probe", data, data)
    message = told("linear-probe", tmp_path / "robots", tmp_path / "robots")
    assert "has images of one class, expected at least two" in message
    assert "--ways: expected at least 2" in told("few-shot", train, "--ways", 1)
    assert "--episodes: expected at least 2" in told("few-shot", train, "--episodes", 1)
