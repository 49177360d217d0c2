"""The page of a run: its figures, and that no text can break it."""

import json
from html.parser import HTMLParser

import pytest

from laclip.rewrite.page import distinct, overlap, write_page


class Cells(HTMLParser):
    """The texts of a page's table cells, and its elements."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags, self.inside = [], set(), False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag == "td"
        if self.inside:
            self.cells.append("")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def page_of(tmp_path, rewrites, rejects=()):
    (tmp_path / "job.json").write_text('{"method": "llm", "model": "m", "prompts": ["plain", "0"]}')
    for kind, entries in (("shards", rewrites), ("rejects", rejects)):
        (tmp_path / kind).mkdir()
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / kind / "a.jsonl").write_text(lines)
    finished = {"shard": "a", "captions": len(rewrites) + len(rejects), "accepted": len(rewrites)}
    reasons = {entry["reason"]: 1 for entry in rejects}
    cells = Cells()
    page = write_page(tmp_path, [finished | {"rejected": reasons}])
    cells.feed(page.read_text())
    return cells, page.read_text()


def test_distinct_ngrams_and_overlap_are_those_of_the_definitions():
    assert distinct(["a b a b", "A b"], 1) == 2 / 6
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a"], 3) == 0
    assert overlap("a red dog", "the red dog") == pytest.approx(2 / 4)


def test_page_shows_every_pair_and_reject_with_its_reason(tmp_path):
    rewrites = [{"source": f"dog {i}", "text": f"the dog {i} runs"} for i in range(10)]
    rejects = [{"source": "a cat", "text": "a cat", "reason": "echo"}]
    found, text = page_of(tmp_path, rewrites, rejects)
    cells = [cell.strip() for cell in found.cells]
    for entry in rewrites:
        assert cells[cells.index(entry["source"]) + 1] == entry["text"]
    assert cells[cells.index("a cat") + 1 :][:2] == ["a cat", "echo"]
    assert cells[cells.index("echo") + 2 :][:2] == ["1", "9.09%"]
    row = cells[cells.index("captions") :]
    assert row[1:3] == ["2.0", "11"]  # words a text, vocabulary: dog and ten numbers
    assert "50.0% on average" in text


def test_no_text_breaks_the_page(tmp_path):
    hostile = "</td><script>alert(1)</script> & \ud800 \x00 " + "x" * 1000
    found, _ = page_of(tmp_path, [{"source": hostile, "text": hostile}])
    assert "script" not in found.tags


def test_a_run_without_rewrites_has_a_page(tmp_path):
    _, text = page_of(tmp_path, [])
    assert "0 rewrites of 0 captions" in text
