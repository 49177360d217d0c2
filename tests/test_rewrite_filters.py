"""Each reason for which a rewrite is rejected, and rewrites that must pass."""

from pathlib import Path

import pytest

from laclip.rewrite.filters import REASONS, reject, tidy, unfit

ORIGINAL = "Brown dog on the beach at Brighton, 2019"
WRONG = [
    ("empty", ""),
    ("empty", "... !"),
    ("lines", "a dog by the sea\na second caption"),
    ("refusal", "I'm sorry, but I cannot help with that."),
    ("refusal", "As an AI language model, I have no eyes"),
    ("refusal", "I can't rewrite this caption"),
    ("refusal", "I’m unable to rewrite this caption."),
    ("refusal", "I can’t assist with that request."),
    ("refusal", "Sorry, I won't do that"),
    ("refusal", "Please provide the caption you would like me to change."),
    ("lines", "a dog by the sea\ra second caption"),
    ("chatter", "Sure, here is a rewrite: a dog by the sea"),
    ("chatter", "Here's another version: a dog by the sea"),
    ("chatter", "Caption: a dog by the sea"),
    ("chatter", "A dog by the sea. Let me know if you need more"),
    ("chatter", "Here’s one: a dog by the sea"),
    ("chatter", "Rephrased: a dog by the sea"),
    ("chatter", "a dog by the sea (Note: I kept the place)"),
    ("markup", "<think>a short one</think> a dog by the sea"),
    ("markup", "a dog by the sea<|im_end|>"),
    ("markup", "a dog by the sea</s>"),
    ("markup", "1. a dog by the sea"),
    ("markup", "- a dog by the sea"),
    ("markup", "**A dog** by the sea"),
    ("markup", '{"caption": "a dog by the sea"}'),
    ("markup", "a dog by the\0 sea"),
    ("prompt", "a dog => a cat"),
    ("prompt", "Shown Beside, the caption"),
    ("echo", "brown dog on the beach, at brighton (2019)"),
    ("repetition", "a dog on a dog on a dog on a dog"),
    ("repetition", "very very very very brown dog"),
    ("long", " ".join(f"word{i}" for i in range(200))),
    ("script", "一只棕色的狗在海滩上"),
    ("script", "коричневая собака"),
]
FINE = [
    "a brown dog running along the seaside in Brighton in 2019",
    "Sure-footed dog on the sand",
    "a dog named Señor Müller by the sea",
    "the sea, the sand and the dog",
    "I saw a brown dog at the sea",
    "a dog: brown, on the beach",
    "you can't believe how this dog loves the sea",
    "a dog - brown - #1 of 3 at the sea, 3 < 4 and <3",
    "3.5 kilometres of sand and *one* dog",
]


@pytest.mark.parametrize(("reason", "text"), WRONG)
def test_unfit_rewrite_is_rejected_with_its_reason(reason, text):
    assert reject(text, ORIGINAL, prompt=("shown beside the caption",)) == reason


@pytest.mark.parametrize("text", FINE)
def test_fit_rewrite_passes(text):
    assert reject(text, ORIGINAL, prompt=("shown beside the caption",)) is None


def test_cut_answer_is_rejected():
    assert reject("a dog by the", ORIGINAL, cut=True) == "cut"
    assert reject("", ORIGINAL, cut=True) == "cut"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("number", "three dogs in 2018"),
        ("name", "a brown dog in London"),
        ("name", "a dog. It looks at Ann's ball"),
        (None, "a dog at Brighton's beach in 2019"),
        (None, "A Dog And Its Owner By The Sea"),
        (None, "Sand. Dogs love it, and I do"),
    ],
)
def test_invented_numbers_and_names_are_rejected_on_demand(reason, text):
    assert reject(text, ORIGINAL, invented=True) == reason
    assert reject(text, ORIGINAL) is None


def test_originals_in_other_scripts_keep_them():
    assert reject("海边的一只狗", "棕色的狗在海滩上") is None
    assert reject("犬が海にいます", "茶色の犬と海") is None
    assert reject("a dog by the sea", "собака у моря") == "script"


def test_what_the_original_says_itself_is_no_chatter():
    assert reject("a sign: sorry, but we are closed", "Sorry, but we are closed (sign)") is None


def test_marks_that_the_original_has_are_kept():
    assert reject("<PERSON> and a friend by the sea", "<person> at the sea with a friend") is None


def test_quotes_around_an_answer_are_taken_off():
    assert tidy(' "a dog"\n') == "a dog" and tidy("“a dog”") == "a dog"
    assert tidy('"a" and "b"') == '"a" and "b"' and tidy('"') == '"'


def test_captions_without_letters_are_unfit():
    assert unfit("") and unfit("12:30 !!! 🙂") and not unfit("犬")


def test_an_arrow_of_the_caption_itself_is_no_fault_where_there_was_no_prompt():
    assert reject("a crimson => blue door", "red => blue door") is None
    assert reject("a crimson => blue door", "red => blue door", prompt=("shown",)) == "prompt"


def test_every_reason_that_is_given_is_explained():
    given = {reason for reason, _ in WRONG} | {"cut", "number", "name", "unfit", "refused"}
    assert given | {"meaning"} == set(REASONS)


@pytest.mark.parametrize(("similarity", "found"), [(0.49, "meaning"), (0.5, None), (None, None)])
def test_what_an_encoder_finds_too_far_is_rejected(similarity, found):
    assert reject(FINE[0], ORIGINAL, similarity=similarity, least=0.5) == found
    assert reject(FINE[0], ORIGINAL, similarity=similarity) is None


def test_every_reason_stands_in_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "rewriting.md").read_text()
    assert all(f"| `{reason}` | {meaning} |" in text for reason, meaning in REASONS.items())
