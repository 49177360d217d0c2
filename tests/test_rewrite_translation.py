"""Back-translation with the real Apertium."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from laclip.cli import main
from laclip.rewrite.translation import BackTranslation, translate


@pytest.fixture(scope="module")
def apertium():
    """Debian's apertium-eng-spa (7 MB), installed where it is not there."""
    if not shutil.which("apertium"):
        command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", "apertium-eng-spa"]
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(command, check=True)
    return BackTranslation("spa")


def test_each_line_is_translated_and_keeps_its_place(apertium):
    lines = ["a red house", "a [strange] ^line$ {of} <marks> @ / \\ 50%", "🙂", "a white dog"]
    found = translate(lines, "eng-spa")
    assert found[0] == "una casa roja" and found[3] == "un perro blanco"
    assert [c for c in found[1] if c in "[]^${}<>@/\\%"] == list("[]^${}<>@/\\%")
    assert found[2] == "🙂"
    assert translate(found, "spa-eng")[3] == "a white dog"


def test_lines_do_not_depend_on_their_neighbours(apertium):
    # Between some of these, Apertium moves words when lines follow each other closely.
    lines = (Path(__file__).parent / "data" / "captions.txt").read_text().split("\n")
    together = translate(lines[:300], "eng-spa")
    assert together[1:10] == [translate([line], "eng-spa")[0] for line in lines[1:10]]
    assert together == [*translate(lines[:130], "eng-spa"), *translate(lines[130:300], "eng-spa")]
    assert sum(a != b for a, b in zip(together, lines, strict=False)) > 290


def test_backtranslation_writes_rewrites_like_any_engine(apertium, emoji_copy, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["rewrite", str(emoji_copy), str(out), "--method", "backtranslate"]) == 0
    rewrites = [json.loads(line) for line in (out / "rewrites.jsonl").open()]
    echoes = json.loads((out / "finished.jsonl").read_text().splitlines()[0])["rejected"]["echo"]
    assert len(rewrites) > 500 and echoes > 50  # short names often come back as they were
    assert rewrites[0]["model"] == "backtranslate spa"
    words = ["tokenize", str(emoji_copy), "--rewrites", f"back={out / 'rewrites.jsonl'}"]
    assert main(words) == 0


def test_missing_language_is_named_with_its_package(apertium, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red door\n")
    words = ["rewrite", str(tmp_path / "a.txt"), str(tmp_path / "out")]
    assert main([*words, "--method", "backtranslate", "--through", "tlh"]) == 2
    said = capsys.readouterr().err
    assert "eng-tlh" in said and "apt-get install apertium-eng-tlh" in said
