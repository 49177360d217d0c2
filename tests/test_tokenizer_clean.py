"""What csrc/text_clean.cpp takes upon itself, against the libraries that define cleaning."""

import html.entities
import itertools
import random
import re
from re import _compiler, _parser

import pytest
from ftfy import badness
from hypothesis import given, settings
from hypothesis import strategies as st

from laclip import text_clean
from laclip.text_clean import clean_text, split_words
from laclip.tokenizer import ReferenceTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer()
    tokenizer.encode("é")  # makes the table of characters
    return tokenizer


def needs_cleaning(tokenizer, texts):
    """The texts that the C++ core refuses."""
    unclean = tokenizer._bpe.encode_ragged(tokenizer._table, tuple(texts), False, 0, 1)[2]
    return [texts[i] for i in unclean]


def through_libraries(tokenizer, text):
    """Ids by way of ftfy and regex, with the C++ core's byte-pair encoding."""
    words = (" ".join(split_words(clean_text(text))),)
    return tokenizer._bpe.encode_ragged(None, words, True, 2**60, 1)[0].tolist()


def test_every_pattern_of_mojibake_holds_a_suspicious_pair():
    groups = text_clean.mojibake_groups()
    alone = set(text_clean.ALONE) | set(map(chr, range(0x80, 0xA0)))
    everything = "".join(map(chr, range(0x10000)))
    tree = _parser.parse(badness.BADNESS_RE.pattern, re.VERBOSE)
    [(operation, (_, branches))] = tree
    assert operation is _parser.BRANCH
    for branch in branches:
        places = []  # the characters that each place of the branch takes
        for element in branch:
            one = _compiler.compile(_parser.SubPattern(tree.state, [element]))
            places.append({c for c in one.findall(everything) if c and c not in alone})
        if any(
            not place and element[0] is not _parser.AT for place, element in zip(places, branch)
        ):
            continue  # needs a character that stands alone
        names = [{groups.get(c, "none") for c in place} for place in places]
        assert any(
            all(text_clean.is_suspicious(*pair) for pair in itertools.product(left, right))
            for left, right in itertools.pairwise(names)
        ), str(branch)


def test_every_character_served_gives_the_libraries_ids(tokenizer):
    characters = [chr(i) for i in range(text_clean.SIZE)]
    refused = set(needs_cleaning(tokenizer, characters))
    served = [c for c in characters if c not in refused]
    assert len(served) > 120_000
    for begin in range(0, len(served), 64):
        some = served[begin : begin + 64]
        for text in (" ".join(some), "".join(f"x{c}'s " for c in some)):
            if not needs_cleaning(tokenizer, [text]):
                assert tokenizer.encode(text) == through_libraries(tokenizer, text), ascii(text)


def test_every_pair_of_characters_beside_an_ampersand(tokenizer):
    letters = [chr(i) for i in range(0x20, 0x7F)]
    texts = [f"x&{a}{b}{end}" for a in letters for b in letters for end in ("", "m z", ";")]
    texts += [f"&{name}" for name in html.entities.html5]
    served = set(texts) - set(needs_cleaning(tokenizer, texts))
    assert 1000 < len(served) < len(texts) - 1000
    changed = [text for text in served if clean_text(text) != " ".join(text.lower().split())]
    assert changed == []


SENTENCES = [
    "a black & white photo of AT&T's “Stadium” — it’s 5° outside…",
    "une école à Besançon, l’été: «trois garçons»",
    "Ein Mädchen mit grüner Mütze trägt Äpfel über die Straße",
    "¿Dónde está el niño? El año pasado en España",
    "Фотография: чёрная кошка на «старом» стуле",
    "Μια γάτα στον ήλιο",
    "猫が窓辺で寝ている写真。東京、日本！",
    "一只猫坐在窗台上，看着外面的雨。",
    "고양이가 창가에서 자고 있다",
    "một con mèo đang ngủ trên ghế",
    "हरे पेड़ के नीचे एक कुत्ता",
    "গাছের নিচে একটি কুকুর",
    "மரத்தின் கீழ் ஒரு நாய்",
    "മരത്തിനടിയിൽ ഒരു നായ",
    "ಮರದ ಕೆಳಗೆ ಒಂದು ನಾಯಿ",
    "ภาพถ่ายของแมวบนเก้าอี้",
    "صورة قطة على الكرسي",
    "חתול יושב על הכיסא",
    "Kış günü İstanbul'da".replace("İ", "I"),
    "so cute 😍🐶👍🏽 👩‍👩‍👧 #dogs ❤️ 🇩🇪",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_ordinary_sentences_need_no_library(tokenizer, text):
    assert needs_cleaning(tokenizer, [text]) == []
    assert tokenizer.encode(text) == through_libraries(tokenizer, text)


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301",  # composes
        "é\u0323",  # comes apart and composes anew
        "ｅ\u0301",  # becomes e, then composes
        "e\u0341",  # becomes a mark, then composes
        "q\u0307\u0323",  # marks change places
        "가\u11a8",  # Hangul composes by rule
        "\u1100\u1161",
        "\u0928\u093c",  # a nukta that composes
        "ΑΣ ΑΣΑ",  # sigma by its place in the word
        "İ",
        "&lt；",  # an entity once its semicolon is narrow
        "＆lt;",
        "&‘",
        "AT&T;",
        "\ufeff&\ufefflt;",
        "ﬁx ĳs ŉ",
        "œ x",
        "a Ã b",
        "\x1b[1mx",
    ],
)
def test_neighbours_that_matter_give_the_libraries_ids(tokenizer, text):
    for around in (text, f"a {text} b", f"a{text}b", f"«{text}»"):
        assert tokenizer.encode(around) == through_libraries(tokenizer, around)


def test_an_unknown_ftfy_sends_all_but_ascii_through_it(tokenizer, monkeypatch):
    import ftfy

    monkeypatch.setattr(ftfy, "__version__", "7.0")
    text_clean.character_table.cache_clear()
    try:
        cautious = load_tokenizer()
        assert [cautious.encode(text) for text in SENTENCES] == [
            tokenizer.encode(text) for text in SENTENCES
        ]
        assert cautious._table is None
    finally:
        text_clean.character_table.cache_clear()


@settings(max_examples=2000)
@given(st.text(st.characters(), max_size=60))  # surrogates included
def test_any_text_gives_the_reference_ids(text):
    tokenizer, reference = TWINS
    assert tokenizer.encode(text) == reference.encode(text)


TWINS = (load_tokenizer(), ReferenceTokenizer())


@pytest.mark.parametrize("word", ["x", "ab", "é", "日本", "🙂", "1", "!", "&", "<", "'"])
def test_a_word_of_a_million_characters(tokenizer, word):
    text = word * (1_000_000 // len(word))
    tokens, _ = tokenizer.encode_ragged([text])
    assert tokenizer.decode(tokens).replace(" ", "") == text
    row = tokenizer.encode_batch([text])[0]
    assert row[1:-1].tolist() == tokens[:75].tolist()


def test_long_words_merge_as_the_reference_merges(tokenizer):
    reference, rng = ReferenceTokenizer(), random.Random(0)
    for length in [63, 64, 65, 66, 127, 200, 500]:
        for letters in ["ab", "aeinst", "the", "haha ha".replace(" ", ""), "abcdefghijklmnop"]:
            word = "".join(rng.choice(letters) for _ in range(length))
            assert tokenizer.encode(word) == reference.encode(word)


def test_a_number_too_long_for_python_is_no_character(tokenizer):
    # html.unescape raises ValueError on these.
    assert tokenizer.encode("&#" + "9" * 5000 + ";") == tokenizer.encode("\ufffd")
    assert tokenizer.encode("x &#" + "0" * 5000 + "65;") == tokenizer.encode("x A")
    assert tokenizer.encode("&amp;#" + "0" * 5000 + ";") == tokenizer.encode("\ufffd")


def test_every_token_decodes_and_encodes_again(tokenizer):
    """Where a token is one word's whole text it is its own encoding, but for those that lower case,
    cleaning or an earlier merge keep from ever being made, as the reference finds as well."""
    reference = TWINS[1]
    again = 0
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        assert text == reference.decode([token])
        ids = tokenizer.encode(text)
        if ids == [token]:
            again += 1
        else:
            assert ids == reference.encode(text)
    assert again > 34_000
