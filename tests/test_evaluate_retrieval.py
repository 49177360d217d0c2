"""laclip evaluate MODEL retrieval, and the scores of held-out tasks that share its ways."""

import json
import shutil

import pytest
import torch
from scored_model import EMOJI, evaluate, refuse, write_tar

from laclip.config import TaskConfig
from laclip.dataset import open_dataset
from laclip.evaluation.data import open_captioned
from laclip.evaluation.held_out import evaluate as evaluate_task
from laclip.evaluation.trained import TrainedModel


def captions_of(name, number):
    """Three captions an image; of two drawings of one thing, one caption is the same."""
    return [f"a {name}", f"the {name}, drawing {number}", f"a small picture of {name} {number}"]


@pytest.fixture
def captioned(drawings, tmp_path):
    members = {}
    for name, images in drawings.items():
        for number, (key, image) in enumerate(images.items()):
            texts = "\n".join(captions_of(name, number)) + "\n"
            members |= {f"{key}.jpg": image, f"{key}.txt": texts.encode()}
    items = list(members.items())
    write_tar(tmp_path / "test" / "0.tar", dict(items[:30]))
    write_tar(tmp_path / "test" / "1.tar", dict(items[30:]))
    return tmp_path / "test"


def test_recalls_equal_those_of_the_whole_matrix_sorted(trained, drawings, captioned):
    scores = evaluate(trained, "retrieval", captioned)
    texts = sorted({t for n in drawings for i in (0, 1) for t in captions_of(n, i)})
    own = torch.zeros(48, len(texts), dtype=torch.bool)
    row = 0
    for name, images in drawings.items():
        for number in range(len(images)):
            own[row, [texts.index(text) for text in captions_of(name, number)]] = True
            row += 1
    model = TrainedModel(trained)
    images, broken = model.encode_images(open_captioned(captioned), "")
    assert not broken
    similarity = images @ model.encode_texts(texts, "").T
    assert scores["texts"] == len(texts) == 24 * 5
    for way, matrix, right in (
        ("image_to_text", similarity, own),
        ("text_to_image", similarity.T, own.T),
    ):
        for at in (1, 5, 10):
            nearest = matrix.topk(at, dim=1).indices
            hits = right.gather(1, nearest).any(dim=1).double().mean().item()
            assert scores[way][f"recall_at_{at}"] == pytest.approx(hits)
        assert scores[way]["chance"] == pytest.approx(48 * 3 / 48 / 120)
    assert scores["image_to_text"]["recall_at_10"] > 0.5


def test_texts_that_are_equal_to_the_model_are_one_text(trained, drawings, tmp_path):
    (name, images), *_ = drawings.items()
    members = {}
    for key, image in images.items():
        members |= {f"{key}.jpg": image, f"{key}.txt": f"{name}\n\n{name.upper()} \n".encode()}
    write_tar(tmp_path / "0.tar", members)
    scores = evaluate(trained, "retrieval", tmp_path)
    assert scores["texts"] == 1 and scores["n"] == 2
    assert scores["image_to_text"]["recall_at_1"] == scores["text_to_image"]["recall_at_1"] == 1


def test_a_dataset_scores_as_its_tars_and_as_the_training_job_does(trained, tmp_path):
    """unseen_vendor has one caption an image and no two are equal."""
    found = evaluate(trained, "retrieval", EMOJI / "unseen_vendor")
    (tmp_path / "0.tar").symlink_to(EMOJI / "unseen_vendor" / "00000.tar")
    bare = evaluate(trained, "retrieval", tmp_path)
    assert found["texts"] == found["n"] == 400
    model = TrainedModel(trained, [f'evaluation.tasks={{v={{data="{EMOJI / "unseen_vendor"}"}}}}'])
    for direction, first in (("image_to_text", "top1"), ("text_to_image", "recall_at_1")):
        assert found[direction] == bare[direction]
        task = TaskConfig(str(EMOJI / "unseen_vendor"), direction)
        scores, _ = evaluate_task(
            task, model.model.encode_image, model.model.encode_text, model.tokenizer,
            model.config.data, image_size=48, context_length=16, batch_size=100, ranks=model.ranks,
        )  # fmt: skip
        assert scores[first] == pytest.approx(found[direction]["recall_at_1"])
        assert scores["chance"] == pytest.approx(found[direction]["chance"])


def test_broken_images_go_with_their_texts(trained, captioned):
    expected = evaluate(trained, "retrieval", captioned)
    texts = b"no image has this\na drawing of nothing\n"
    write_tar(captioned / "2.tar", {"broken.jpg": b"no image", "broken.txt": texts})
    scores = evaluate(trained, "retrieval", captioned)
    assert list(scores["undecodable_images"]) == ["2.tar/broken"]
    for key in ("texts", "n", "image_to_text", "text_to_image"):
        assert scores[key] == expected[key]


def test_a_dataset_image_that_does_not_decode_is_left_out_of_both(trained, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(EMOJI / "unseen_vendor", folder)
    table = open_dataset(folder).samples(0)
    record = table.records[7]
    with (folder / "00000.tar").open("r+b") as tar:
        tar.seek(int(record["offset"]))
        tar.write(bytes(int(record["bytes"])))
    scores = evaluate(trained, "retrieval", folder)
    assert list(scores["undecodable_images"]) == [f"00000.tar/{table.key(7)}"]
    assert scores["n"] == scores["texts"] == 399
    model = TrainedModel(trained)
    found, examples = evaluate_task(
        TaskConfig(str(folder), "text_to_image"), model.model.encode_image,
        model.model.encode_text, model.tokenizer, model.config.data, image_size=48,
        context_length=16, batch_size=100, ranks=model.ranks,
    )  # fmt: skip
    assert (found["n"], found["undecodable"], len(examples)) == (399, 1, 12)
    expected = scores["text_to_image"]["recall_at_1"]
    assert found["recall_at_1"] == pytest.approx(expected)


def test_what_holds_no_captions_is_refused(trained, emoji_copy, tmp_path, capsys):
    def told(data):
        return refuse(capsys, trained, "retrieval", data)

    assert "there is no such folder" in told(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    assert "found neither dataset.json nor *.tar" in told(tmp_path / "bare")
    write_tar(tmp_path / "classes" / "0.tar", {"x.jpg": b"image", "x.cls": b"1"})
    assert "'x' has no .txt" in told(tmp_path / "classes")
    write_tar(tmp_path / "empty" / "0.tar", {"x.jpg": b"image", "x.txt": b"\n"})
    assert "0.tar/x: its .txt holds no caption" in told(tmp_path / "empty")
    manifest = json.loads((emoji_copy / "dataset.json").read_text())
    (emoji_copy / "dataset.json").write_text(json.dumps(manifest | {"variants": []}))
    assert "has no captions yet. Run: laclip tokenize" in told(emoji_copy)
