"""The C++ tokenizer against its Python twin on random strings.

As a program it runs more of them, and prints a record:
    python tests/test_tokenizer_fuzz.py --strings 10000000 --seed 1
"""

import argparse
import functools
import html.entities
import json
import random
import time
import unicodedata
from pathlib import Path

import ftfy
import regex

from laclip import text_clean
from laclip.tokenizer import ReferenceTokenizer, load_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data" / "clip_tokens.json").read_text())["cases"]
PLAIN_WORDS = (
    "a photo of the cat dog red-haired isn't we'll I've CAN'T 'S o'clock 2019 1,000 R&B AT&T "
    "café naïve ÉCOLE straße Москва собака «кошка» 猫 東京タワー 고양이 ảnh σκύλος ΣΚΥΛΟΣ कुत्ता "
    "แมว قطة חתול İzmir ĳs ﬁne ½ Ⅷ &amp; &amp;amp; &lt;b&gt; &#39; &#x27; &eacute; &EACUTE; "
    "&copy &notit; &nbsp; &#0; <|startoftext|> <|endoftext|> <b> ’s “quoted” it’s l’été – — … "
    "™ © € £5 5° № 👍🏽 🇩🇪 ❤️ ſ 'ſ Ã© â€™ Ã Â œ Œ"
)
WORDS = [
    *PLAIN_WORDS.split(),
    *("\x00", "\x1b[31m", "\ufeff", "\u200b", "\u200d", "\u2028", "\x85", "\ud83d", "\ude00"),
    *("\u0301", "\u0345", "\u212a", "\u212b"),
]
RANGES = [
    (0x00, 0x80),
    (0x20, 0x7F),
    (0x80, 0x100),
    (0xA0, 0x250),
    (0x2B0, 0x370),
    (0x370, 0x530),
    (0x590, 0x700),
    (0x900, 0xE80),
    (0x1100, 0x1200),
    (0x1E00, 0x2000),
    (0x2000, 0x2800),
    (0x3000, 0x3200),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),
    (0xD800, 0xE000),
    (0xF900, 0x10000),
    (0x10000, 0x10600),
    (0x1D000, 0x1D800),
    (0x1F100, 0x1FB00),
    (0x20000, 0x2FA20),
    (0, 0x110000),
]
# Characters that some rule of cleaning singles out, twice as often as the rest together.
MARKED = [
    "".join(text_clean.mojibake_groups()) + text_clean.ALONE,
    "'’‘“”\"",
    "&;#<> \t\r\n",
    "'sStTmMdDrReEvVlLſ",
    "ΣσςAΑa. ",
    "ÃÂ âaz",
]
ENTITIES = [f"&{name}" for name in html.entities.html5]
CODECS = ["latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1257", "mac-roman", "cp437"]


def random_text(rng):
    """One string: words, characters of one range, marked characters, mojibake, or a mixture."""
    kind = rng.random()
    if kind < 0.3:
        text = rng.choice((" ", " ", "", "\n")).join(rng.choices(WORDS, k=rng.randrange(1, 7)))
    elif kind < 0.4:
        text = rng.choice(GOLDEN)[0]
        begin = rng.randrange(len(text) + 1)
        text = text[begin : begin + rng.randrange(30)]
    elif kind < 0.65:
        low, high = rng.choice(RANGES)
        count = rng.randrange(1, 12)
        text = "".join(chr(rng.randrange(low, high)) for _ in range(count))
        if rng.random() < 0.5:
            text = " ".join(text[i : i + 3] for i in range(0, count, 3))
    else:
        text = "".join(rng.choice(rng.choice(MARKED)) for _ in range(rng.randrange(1, 12)))
    if rng.random() < 0.15:
        text = text.encode("utf-8", "replace").decode(rng.choice(CODECS), "replace")
    if rng.random() < 0.3:
        at = rng.randrange(len(text) + 1)
        low, high = rng.choice(RANGES)
        text = text[:at] + chr(rng.randrange(low, high)) + text[at:]
    if rng.random() < 0.2:
        at = rng.randrange(len(text) + 1)
        text = (
            text[:at] + "".join(random_entity(rng) for _ in range(rng.randrange(1, 4))) + text[at:]
        )
    return text.upper() if rng.random() < 0.05 else text


def random_entity(rng):
    """A named or numbered character, some of them mojibake, some escaped twice."""
    kind = rng.random()
    if kind < 0.4:
        entity = rng.choice(ENTITIES)
    else:
        code = (
            ord(rng.choice(rng.choice(MARKED)))
            if kind < 0.6
            else rng.randrange(*rng.choice(RANGES))
        )
        entity = f"&#{code};" if rng.random() < 0.5 else f"&#x{code:x};"
    return entity.replace("&", "&amp;") if rng.random() < 0.1 else entity


class CachedReference(ReferenceTokenizer):
    """The twin, each word encoded once."""

    @functools.lru_cache(maxsize=1 << 18)  # noqa: B019
    def _encode_word(self, word):
        return super()._encode_word(word)


def compare(strings, seed, report=None):
    """How many of the strings took the slow path; raises at the first whose ids differ."""
    rng = random.Random(seed)
    tokenizer, reference = load_tokenizer(), CachedReference()
    tokenizer.encode("é")  # makes the table
    unclean = 0
    for begin in range(0, strings, 10_000):
        texts = tuple(random_text(rng) for _ in range(min(10_000, strings - begin)))
        tokens, offsets = tokenizer.encode_ragged(texts)
        unclean += len(tokenizer._bpe.encode_ragged(tokenizer._table, texts, False, 0, 1)[2])
        for i, text in enumerate(texts):
            found = tokens[offsets[i] : offsets[i + 1]].tolist()
            expected = reference.encode(text)
            assert found == expected, f"{text!a}: found {found}, expected {expected}"
        if report:
            report(begin + len(texts))
    return unclean


def test_a_hundred_thousand_strings_give_the_reference_ids():
    unclean = compare(100_000, seed=0)
    assert 10_000 < unclean < 90_000, "both the fast and the slow path must be tried"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strings", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.time()

    def report(done):
        rate = done / (time.time() - began)
        left = (arguments.strings - done) / rate
        print(f"\r{done:,} strings, {rate:,.0f} a second, {left:,.0f} s left ", end="", flush=True)

    unclean = compare(arguments.strings, arguments.seed, report)
    versions = {"ftfy": ftfy.__version__, "regex": regex.__version__}
    versions["unicodedata"] = unicodedata.unidata_version
    print()
    print(
        json.dumps(
            {
                "name": "tokenizer_fuzz",
                "strings": arguments.strings,
                "seed": arguments.seed,
                "differences": 0,
                "slow_path": unclean,
                "seconds": round(time.time() - began),
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
