"""laclip verify finds what is wrong with a dataset; laclip inspect shows what it holds."""

import base64
import html
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from laclip.cli import main
from laclip.dataset import open_dataset
from laclip.prepare.inspect import pick, summary
from laclip.prepare.tokenize import tokenize
from laclip.prepare.verify import verify

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMOJI / "unseen_concept", tmp_path / "set")


def test_a_whole_dataset_has_no_problems(folder, capsys):
    assert verify(folder) == []
    assert main(["verify", str(folder), "--jobs", "1"]) == 0
    assert "all files are whole and fit each other" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dataset.json", "00000.samples", "00000.captions", "00000.tar"])
def test_any_flipped_bit_is_found(name, folder):
    path = folder / name
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    # Every byte of the headers and of dataset.json, and some of the rest.
    places = {*range(0, min(len(whole), 400), 3), *rng.integers(0, len(whole), 40).tolist()}
    for at in sorted(places):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(flipped)
        try:
            problems = verify(folder)
        except ValueError as error:
            assert name == "dataset.json"  # which is refused as a whole
            problems = [str(error)]
        assert problems, f"byte {at} of {name}"
        assert any(str(folder) in problem for problem in problems)


def test_a_flipped_bit_of_a_key_is_told_by_all_that_read_it(folder, capsys):
    path = folder / "00000.samples"
    whole = bytearray(path.read_bytes())
    for bit in (1, 128):  # another key, and one that is no text
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ bit]))
        for command in ("verify", "tokenize"):
            assert main([command, str(folder), "--jobs", "1"]) != 0
            told = "".join(capsys.readouterr())
            assert f"{path}: its bytes do not give its checksum. Run: laclip index --force" in told
    assert main(["index", str(folder), "--force", "--jobs", "1"]) == 0
    assert verify(folder) == []


def test_what_is_told_of_a_broken_dataset_json_mends_it(folder, capsys):
    file = folder / "dataset.json"
    file.write_text(file.read_text().replace("captions_checksum", "captions_chucksum", 1))
    assert main(["verify", str(folder), "--jobs", "1"]) == 2
    assert f"Run: laclip index {folder}" in capsys.readouterr().err
    assert main(["index", str(folder), "--jobs", "1"]) == 0
    assert verify(folder) == []


@pytest.mark.parametrize("name", ["00000.samples", "00000.captions", "00000.tar"])
@pytest.mark.parametrize("cut", [None, 0, 100, -1])
def test_missing_and_cut_files_are_found(name, cut, folder, capsys):
    path = folder / name
    whole = path.read_bytes()
    if cut is None:
        path.unlink()
    else:
        path.write_bytes(whole[:cut])
    assert main(["verify", str(folder), "--jobs", "1"]) == 1
    output = capsys.readouterr().out
    assert name in output and re.search("[Rr]un: laclip (index|tokenize)", output)


def test_files_of_no_shard_are_found(folder):
    (folder / "00007.captions").write_bytes(b"")
    (folder / "00008.tar").write_bytes(b"")
    gone, new = verify(folder)
    assert "00007.captions: no shard of dataset.json. Its tar is gone: remove it" in gone
    assert f"00008.tar: no shard of dataset.json. Run: laclip index {folder}" in new


def test_a_swapped_sidecar_is_found(folder):
    other = EMOJI / "unseen_vendor"
    for suffix in ("samples", "captions"):
        shutil.copy(other / f"00000.{suffix}", folder)
    found = "\n".join(verify(folder))
    assert "00000.samples: is not the file that dataset.json records" in found
    assert "00000.captions: is not the file that dataset.json records" in found


def test_the_summary_counts_what_is_there():
    text = summary(open_dataset(EMOJI / "train"))
    assert "3,070 in 3 shards, 0 bad" in text and "3,070 jpeg" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert sum(map(int, rows["original"][2:])) == 3070
    assert int(rows["name"][0]) + sum(map(int, rows["name"][2:])) == 3070
    assert rows["variant"] == [
        "missing",
        "short",
        "0",
        "1-5",
        "6-10",
        "11-20",
        "21-40",
        "41-75",
        "76+",
    ]


def test_a_dataset_without_bad_samples_says_so(capsys):
    assert main(["inspect", str(EMOJI / "train"), "--bad"]) == 0
    assert capsys.readouterr() == ("", f"{EMOJI / 'train'}: no bad samples\n")


def test_the_summary_needs_no_tokenizer(folder, tmp_path, capsys):
    model = tmp_path / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small dog in the red house", "the blue cat"] * 9),
        model_prefix=str(model), vocab_size=20, minloglevel=2,
    )  # fmt: skip
    others = open_dataset(folder).variants[1:]
    tokenize(folder, drop=others, tokenizer=f"sentencepiece:{model}.model")
    assert main(["inspect", str(folder)]) == 0
    assert "tokenizer    sentencepiece:" in capsys.readouterr().out


def test_one_sample_is_shown_with_all_its_variants(capsys):
    assert main(["inspect", str(EMOJI / "train"), "--sample", "noto-1f525"]) == 0
    output = capsys.readouterr().out
    assert "KEY.txt: 'fire'" in output and "name (2 tokens): flame emoji" in output
    assert "unicode (missing)" in output
    assert main(["inspect", str(EMOJI / "train"), "--sample", "nothing"]) == 2
    assert "no sample has the key 'nothing'" in capsys.readouterr().err


def test_the_page_shows_the_very_images(tmp_path):
    page = tmp_path / "page.html"
    command = ["inspect", str(EMOJI / "train"), "--html", str(page), "--count", "7", "--seed", "5"]
    assert main(command) == 0
    text = page.read_text()
    shown = re.findall(r'data:image/jpeg;base64,([^"]+)', text)
    dataset = open_dataset(EMOJI / "train")
    places = pick(dataset, 7, 5)
    assert len(shown) == len(set(places)) == 7
    for image, (shard, index) in zip(shown, places, strict=True):
        record = dataset.samples(shard).records[index]
        begin = int(record["offset"])
        data = dataset.tar_path(shard).read_bytes()[begin : begin + int(record["bytes"])]
        assert base64.b64decode(image) == data
        assert html.escape(dataset.samples(shard).key(index)) in text


def test_the_page_of_more_samples_than_there_are_shows_each_once():
    dataset = open_dataset(EMOJI / "unseen_concept")
    assert pick(dataset, 10**6, 0) == [(0, i) for i in range(dataset.num_samples)]


@pytest.mark.parametrize("command", ["pack", "index", "tokenize", "verify", "inspect"])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: laclip {command}" in output
    expected = {
        "pack": ("--pairs", "--images", "--rows", "--jobs", "--ray"),
        "index": ("--decode", "--force", "--jobs", "--ray"),
        "tokenize": ("--rewrites", "--original-csv", "--join", "--drop", "--tokenizer"),
        "verify": ("--jobs", "--ray"),
        "inspect": ("--sample", "--bad", "--html", "--count", "--seed"),
    }
    for option in expected[command]:
        assert option in output
