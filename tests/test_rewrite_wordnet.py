"""EDA with WordNet's own files."""

import json
import shutil
from collections import Counter

import pytest

from laclip.cli import main
from laclip.rewrite.wordnet import EasyAugmentation, WordNet


@pytest.fixture(scope="module")
def augmentation(wordnet):
    return EasyAugmentation(wordnet)


def test_synonyms_are_the_words_of_all_synsets(wordnet):
    wordnet = WordNet(wordnet)
    assert wordnet.synonyms("automobile") == ("car", "auto", "machine", "motorcar")
    assert "domestic dog" in wordnet.synonyms("dog")
    assert wordnet.synonyms("of") == wordnet.synonyms("qwertz") == ()


def test_the_four_operations_are_drawn_evenly(augmentation):
    caption = "an automobile beside a big house near the large river"
    words = Counter(caption.split())
    kinds = Counter()
    for seed in range(2000):
        changed = augmentation.change(caption, seed)
        found = Counter(changed.split())
        new, lost = found - words, words - found
        if not new and not lost:
            kinds["swap" if changed != caption else "nothing"] += 1
        else:
            kinds["deletion" if not new else "insertion" if not lost else "replacement"] += 1
    # An insertion repeats no word; a deletion may delete nothing (0.9 to the tenth power).
    assert abs(kinds["swap"] - 500) < 110 and abs(kinds["replacement"] - 500) < 110
    assert abs(kinds["insertion"] - 500) < 110
    assert abs(kinds["deletion"] - 500 * (1 - 0.9**10)) < 110
    assert abs(kinds["nothing"] - 500 * 0.9**10) < 110


def test_a_change_is_a_function_of_caption_and_seed(augmentation, wordnet):
    caption = "A small dog, running on the beach."
    again = EasyAugmentation(wordnet)
    changes = [augmentation.change(caption, seed) for seed in range(50)]
    assert changes == [again.change(caption, seed) for seed in range(50)]
    assert len(set(changes)) > 20


def test_punctuation_and_function_words_stay(augmentation):
    for seed in range(200):
        changed = augmentation.change("(dog), of the", seed)
        assert changed.count("(") == changed.count(")")
    assert {augmentation.change("of the", seed) for seed in range(50)} <= {
        "of the", "the of", "of", "the"
    }  # fmt: skip


def test_eda_writes_rewrites_like_any_engine(wordnet, emoji_copy, tmp_path, capsys):
    words = ["rewrite", str(emoji_copy), str(tmp_path / "out"), "--method", "eda"]
    assert main([*words, "--wordnet", str(wordnet)]) == 0
    rewrites = [json.loads(line) for line in (tmp_path / "out" / "rewrites.jsonl").open()]
    assert len(rewrites) > 1000 and rewrites[0]["model"] == "eda"
    laclip, *step = capsys.readouterr().out.splitlines()[-1].removeprefix("Next: ").split()
    assert laclip == "laclip" and main(step) == 0  # the next step, as it is told
    assert "NAME" in capsys.readouterr().out


def test_missing_wordnet_is_named_with_its_package(wordnet, tmp_path, capsys):
    for path in wordnet.glob("*.noun"):
        shutil.copy(path, tmp_path)
    (tmp_path / "a.txt").write_text("a red door\n")
    words = ["rewrite", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--method", "eda"]
    assert main([*words, "--wordnet", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "index.verb" in said and "apt-get install wordnet-base" in said
