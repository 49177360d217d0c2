"""Prompts: the same caption always gets the same examples, and no caption breaks its prompt."""

import json
from collections import Counter

import pytest

from laclip.cli import main
from laclip.rewrite.prompts import BUILT_IN, MAX_CHARACTERS, clean, load_prompts


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_set_has_16_distinct_pairs_that_fit_a_prompt(name):
    prompts = load_prompts(name)
    texts = [text for pair in prompts.pairs for text in pair]
    assert len(prompts.pairs) == 16 and len(set(texts)) == 32
    assert all(text == clean(text) and text for text in texts)


def test_no_pair_stands_in_two_built_in_sets():
    texts = Counter(text for name in BUILT_IN for pair in load_prompts(name).pairs for text in pair)
    assert max(texts.values()) == 1


def test_examples_are_drawn_without_replacement_and_evenly():
    prompts = load_prompts("plain")
    drawn = [prompts.draw(f"{i:09}", 0)[0] for i in range(4000)]
    assert all(len(set(examples)) == 3 for examples in drawn)
    for place in range(3):  # 250 expected of each pair; the limits are five standard errors away
        counts = Counter(examples[place] for examples in drawn)
        assert len(counts) == 16 and min(counts.values()) > 173 and max(counts.values()) < 327


def test_draw_depends_on_key_seed_and_set_alone():
    plain, brief = load_prompts("plain"), load_prompts("brief")
    assert plain.draw("cat", 3) == load_prompts("plain").draw("cat", 3)
    draws = [plain.draw("cat", 3), plain.draw("cat", 4), plain.draw("dog", 3), brief.draw("cat", 3)]
    assert len({seed for _, seed in draws}) == 4
    assert all(0 <= seed < 2**31 for _, seed in draws)


def test_draw_is_the_one_of_earlier_releases():
    # Datasets of rewrites are continued over years: these numbers may never change.
    examples, seed = load_prompts("plain").draw("000000012", 7)
    places = [load_prompts("plain").pairs.index(pair) for pair in examples]
    assert (places, seed) == ([13, 8, 4], 723773550)


def test_prompt_has_the_form_of_the_paper():
    prompts = load_prompts("plain")
    lines = prompts.text("a dog", [("a", "b"), ("c", "d"), ("e", "f")]).split("\n")
    assert lines == [prompts.instruction, "", "a => b", "c => d", "e => f", "a dog =>"]


def test_chat_shows_the_same_examples_as_turns():
    chat = load_prompts("plain").messages("a dog", [("a", "b"), ("c", "d"), ("e", "f")])
    assert [turn["role"] for turn in chat] == ["system", *["user", "assistant"] * 3, "user"]
    assert [turn["content"] for turn in chat[1:]] == ["a", "b", "c", "d", "e", "f", "a dog"]


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a => b =>", "a b"),
        ("two\nlines\r\nand\ttab", "two lines and tab"),
        ("word " * 2000, ("word " * 120).strip()),
        ("x" * 10_000, "x" * MAX_CHARACTERS),
        ("собака у моря", "собака у моря"),
    ],
)
def test_a_caption_is_one_short_line_of_its_prompt(caption, shown):
    assert clean(caption) == shown
    assert load_prompts("plain").text(caption, []).split("\n")[-1] == f"{shown} =>"


def test_users_set_comes_from_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    pairs = [{"source": f"s {i}", "target": f"t {i}"} for i in range(5)]
    lines = [{"instruction": "Say it in verse."}, *pairs]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    prompts = load_prompts(str(path))
    assert (prompts.name, prompts.instruction) == ("mine", "Say it in verse.")
    assert prompts.pairs[4] == ("s 4", "t 4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"source": "a"}\n', "line 1: found"),
        ('{"source": "a", "target": "b"}\nnonsense\n', "line 2: found 'nonsense'"),
        ('{"source": "a", "target": " "}\n', "line 1: found"),
        ('{"source": "a", "target": "b"}\n' * 3, "3 pairs"),
    ],
)
def test_unfit_set_is_refused_with_its_line(text, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path))


def test_dry_run_prints_prompts_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a red door\na blue door\n")
    out = tmp_path / "out"
    assert main(["rewrite", str(tmp_path / "captions.txt"), str(out), "--dry-run", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("--- 0 (seed ") and printed.endswith("a red door =>\n")
    assert not out.exists()
