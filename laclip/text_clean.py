"""CLIP's text cleaning, and what the C++ core may know of it.

`clean_text` and `split_words` are the definition: ftfy, html, regex and Python's own Unicode, as
OpenAI's SimpleTokenizer calls them. `character_table` asks the same libraries what they do to each
character, so that csrc/text_clean.cpp can serve the texts that they leave alone but for changes of
single characters, and refuse the rest.
"""

import functools
import html
import itertools
import re
import unicodedata

import numpy as np

WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@functools.cache
def _libraries():
    # Imported late: plain English needs neither, and they take 50 ms.
    import ftfy
    import regex

    return ftfy, regex, regex.compile(r"\s+"), regex.compile(WORDS, regex.IGNORECASE)


# Python refuses to read decimal numbers of more digits than this, so html.unescape raises.
_MAX_DIGITS = 4300
_LONG_REFERENCE = re.compile(rf"&#([0-9]{{{_MAX_DIGITS},}})")


def _unescape(text):
    if len(text) > _MAX_DIGITS:
        # Eight digits say as well as a million that there is no such character.
        text = _LONG_REFERENCE.sub(lambda m: f"&#{m[1].lstrip('0')[:8] or '0'}", text)
    return html.unescape(text)


def clean_text(text):
    """The text as the vocabulary expects it: mended by ftfy, entities resolved, white space
    squeezed, lower case."""
    ftfy, _, spaces, _ = _libraries()
    text = _unescape(_unescape(ftfy.fix_text(text))).strip()
    return spaces.sub(" ", text).strip().lower()


def split_words(text):
    """The words of a cleaned text; each is encoded on its own."""
    return _libraries()[3].findall(text)


def resolve_entities(text):
    """The text with entities resolved as ftfy does, where its cleaning stays the same if what is
    given back needs none; else the text itself.

    ftfy's fix_text resolves them first of all and goes on from there, so a text without any in
    their place is a step of the same way, unless a `<`, which makes it leave entities alone, or a
    cut of its (at a million characters) comes between.
    """
    if "<" in text or len(text) >= 1_000_000:
        return text
    resolved = _libraries()[0].fixes.unescape_html(text)
    return text if "<" in resolved else resolved


# --- What ftfy.badness calls mojibake takes, but for a few characters that stand alone, two
# neighbours beyond ASCII. The characters of its pattern fall into these groups, and a text where
# no two neighbours stand in SUSPICIOUS is not mojibake (tests/test_tokenizer_clean.py proves it
# from the pattern).
FTFY_VERSION = "6.3.1"  # whose badness and fixes the groups describe; another one: no table
ALONE = "ÂÃŒœ"  # and the C1 controls: suspicious whatever stands beside them
GROUPS = {
    "letter": ["lower_common", "upper_common"],
    "accented": ["lower_accented", "kaomoji"],
    "upper": ["upper_accented"],
    "common": ["common"],
    "opening": ["start_punctuation"],
    "sign": ["box", "end_punctuation", "currency", "numeric", "law"],
    "bad": ["bad"],
}
# Characters that the pattern names one by one and that so belong elsewhere than their category.
SINGLED_OUT = {"framing": "ВГРСΒΓΞΟ", "dje": "Ђ", "euro": "€", "sign": "°‚", "lead": "ØÙÎÐ"}
NAMES = ["none", *GROUPS, "framing", "dje", "euro", "lead"]
LETTERS = ("letter", "accented", "framing")
HARMLESS = {
    *itertools.product((*LETTERS, "opening"), LETTERS),
    *itertools.product(("common", "sign", "bad"), ("letter", "framing")),
    *itertools.product(("common",), NAMES),
    *itertools.product(("letter", "accented", "upper", "framing"), ("common",)),
    *itertools.product(("opening",), ("upper", "lead")),
    *itertools.product(("letter",), ("opening", "sign")),
}


def is_suspicious(left, right):
    """Whether two neighbours of these groups may be part of mojibake."""
    return "none" not in (left, right) and (left, right) not in HARMLESS


def mojibake_groups():
    """{character: name of its group} for the characters that ftfy's badness knows."""
    from ftfy import badness

    # Whatever the pattern mentions and no category holds is taken for a sign.
    groups = {c: "sign" for c in badness.BADNESS_RE.pattern if not c.isascii()}
    everything = "".join(map(chr, range(0x80, 0x10000)))
    for name, categories in GROUPS.items():
        for category in categories:
            ranges = f"[{badness.MOJIBAKE_CATEGORIES[category]}]"
            groups |= dict.fromkeys(re.findall(ranges, everything), name)
    for name, characters in SINGLED_OUT.items():
        groups |= dict.fromkeys(characters, name)
    return groups


# --- The table itself: one entry for each character of Unicode's first two planes.
SIZE = 0x20000
LETTER, NUMBER, OTHER = 1 << 21, 1 << 22, 1 << 23
GROUP_SHIFT = 24
DECOMPOSES, COMPOSES, REFUSED = 1 << 28, 1 << 29, 1 << 31


@functools.cache
def character_table():
    """What cleaning, lower case and the words' pattern make of each character, by asking the
    libraries that are installed: the arguments of laclip._native.CharacterTable.

    Takes 60 ms, once, when the first text beyond ASCII comes. None where ftfy is not the version
    whose rules are known here: then all such texts go through it.
    """
    ftfy, regex, _, _ = _libraries()
    if ftfy.__version__ != FTFY_VERSION:
        return None
    every = "".join(map(chr, range(SIZE)))
    refused = np.zeros(SIZE, bool)
    refused[0xD800:0xE000] = True
    refused[0x80:0xA0] = True
    refused[[ord(c) for c in ALONE]] = True
    refused[ord("Σ")] = True  # its lower case depends on its neighbours

    # NFC leaves a text alone if each character is by itself composed, combining classes do not
    # fall, and none composes with the last starter before it (Unicode Standard Annex 15).
    combining = np.fromiter(map(unicodedata.combining, every), np.uint8, SIZE)
    refused[0x1161:0x1176] = refused[0x11A8:0x11C3] = True  # Hangul vowels and finals
    normal = np.zeros(SIZE, np.uint32)
    changed = set()
    pairs = []
    for i, decomposition in enumerate(map(unicodedata.decomposition, every)):
        if decomposition and decomposition[0] != "<":
            normal[i] |= DECOMPOSES
            *first, last = (int(part, 16) for part in decomposition.split())
            if unicodedata.normalize("NFC", chr(i)) != chr(i):
                changed.add(i)
            else:
                normal[last] |= COMPOSES
                pairs.append(first[0] << 32 | last)
    normal[0xAC00:0xD7A4] |= DECOMPOSES

    # ftfy's changes of one character for one; all others are refused.
    for mapping in (ftfy.chardata.LIGATURES, ftfy.chardata.WIDTH_MAP, ftfy.chardata.CONTROL_CHARS):
        changed |= mapping.keys()
    quotes = f"{ftfy.chardata.SINGLE_QUOTE_RE.pattern}|{ftfy.chardata.DOUBLE_QUOTE_RE.pattern}"
    changed |= {ord(c) for c in re.findall(f"{quotes}|[\u2028\u2029]", every)}
    groups = mojibake_groups()
    fixed = np.arange(SIZE)
    for i in changed:
        to = ftfy.fix_text(chr(i))
        # A new '&' might begin an entity, a suspicious character mojibake; others end it there.
        to_one = len(to) == 1 and ord(to) < SIZE and ord(to) not in changed
        if to_one and to != "&" and to not in groups:
            fixed[i] = ord(to)
            normal[i] |= DECOMPOSES
            refused[i] |= bool(normal[ord(to)] & COMPOSES)
        else:
            refused[i] = True

    lower = np.arange(SIZE)
    for i, c in enumerate(map(str.lower, every)):
        if len(c) == 1:
            lower[i] = ord(c)
        else:
            refused[i] = True

    classes = np.zeros(SIZE, np.uint32)
    for pattern, bit in (
        (r"[\p{L}]+", LETTER),
        (r"[\p{N}]+", NUMBER),
        (r"[^\s\p{L}\p{N}]+", OTHER),
    ):
        for match in regex.finditer(pattern, every, regex.IGNORECASE):
            classes[slice(*match.span())] |= bit
    # A character of two classes, as U+0345 is when case does not matter, needs the pattern itself.
    refused |= ~np.isin(classes, (0, LETTER, NUMBER, OTHER))
    for i in np.flatnonzero(classes == 0):
        refused[i] |= not (chr(i).isspace() and regex.match(r"\s", chr(i)))
    # Letters that the pattern takes for those of 's and <|startoftext|>, such as the long s.
    for match in regex.finditer("[a-z]", every[0x80:], regex.IGNORECASE):
        refused[0x80 + match.start()] = True
    lower = lower[fixed]
    refused |= refused[fixed] | refused[lower]

    entries = (
        lower.astype(np.uint32) | classes[lower] | normal | (refused.astype(np.uint32) * REFUSED)
    )
    for c, name in groups.items():
        entries[ord(c)] |= NAMES.index(name) << GROUP_SHIFT
    suspicious = [
        sum(is_suspicious(left, right) << i for i, right in enumerate(NAMES)) for left in NAMES
    ]
    compositions = np.array(sorted(pairs), np.uint64)
    return entries, combining[fixed], np.array(suspicious, np.uint16), compositions
