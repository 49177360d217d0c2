"""What disqualifies a rewrite: the reasons, in the order in which they are looked for."""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

REASONS = {
    "unfit": "the caption has no letters: nothing to rewrite, no model was asked",
    "refused": "the server refused the request for this caption (too long for its context, ...)",
    "cut": "the answer ran into the limit of new tokens (--max-tokens)",
    "empty": "no words in the answer",
    "lines": "the answer has several lines",
    "refusal": "the model declines or speaks of itself",
    "chatter": "words about the answer ('Sure, here is ...') around it",
    "markup": "marks of a list, of Markdown, HTML or JSON, or of a model's own format",
    "prompt": "parts of the prompt: its arrow, its instruction, one of its examples",
    "echo": "the original again, but for case and punctuation",
    "repetition": "the same words over and over",
    "long": "far longer than a caption",
    "script": "letters of a script that the original does not use",
    "number": "a number that the original does not have (--reject-invented)",
    "name": "a name that the original does not have (--reject-invented)",
    "meaning": "too far from the original in meaning (--min-similarity)",
}
MAX_CHARACTERS = 500
_REFUSAL = re.compile(
    r"\b(as an ai|ai (language )?model|language model|i apologi[sz]e|sorry, (but|i)\b"
    r"|i('m| am) (sorry|unable|not (able|comfortable))|i (do not|don't) feel comfortable"
    r"|i (can('|no)?t|won't|will not) (help|assist|rewrite|rephrase|see|view|provide|create"
    r"|generate|fulfill?|comply|process|do th(at|is))"
    r"|i (do not|don't) have (access|the ability)"
    r"|please (provide|share) (the|a|your|me)\b)",
    re.IGNORECASE,
)
_CHATTER = re.compile(
    r"^\W*(sure|certainly|of course|absolutely|great|okay|ok)\s*[,!.:]"
    r"|^\W*(sure|certainly|of course)\b.{0,40}\bhere\b|\bhere('s| is| are)\b.{0,60}:"
    r"|^\W*(the )?(rewritten|rephrased|revised|new|alternative|modified|original)?\s*"
    r"(caption|rewrite|version|answer|output|response|description)\s*:"
    r"|^\W*(rewritten|rephrased|revised|assistant)\s*:|\b(note|original( caption)?):"
    r"|\b(let me know|feel free|hope (this|that) helps|would you like|happy to help)\b"
    r"|\b(rewritten|rephrased|revised) (caption|version|sentence)\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"^([-*#•]+|\d+[.)])\s|\*\*|``|<[|/]?[a-z_]+[|/]?>|\[/?inst\]|\\n|^[{\[]\W*\"|[\0-\x08\x0e-\x1f\x7f]",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")


def tidy(answer: str) -> str:
    """An answer without what models put around it: blanks and a pair of quotes."""
    text = answer.strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”", "‘’", "``"):
        inside = text[1:-1]
        if text[0] not in inside and text[-1] not in inside:
            text = inside.strip()
    return text


def unfit(caption: str) -> bool:
    """Whether a caption has nothing that could be said otherwise."""
    return not any(character.isalpha() for character in caption)


def reject(
    rewrite: str,
    original: str,
    *,
    cut: bool = False,
    prompt: tuple[str, ...] = (),
    invented: bool = False,
    similarity: float | None = None,
    least: float | None = None,
) -> str | None:
    """The first reason in REASONS why a rewrite is no caption, or None.

    prompt: the texts that the prompt showed beside the caption. invented: numbers and names that
    the original does not have disqualify as well. Names are told by their capitals inside a
    sentence, so a caption in title case has none. similarity: in meaning, where it was measured;
    below `least` it disqualifies.
    """
    if cut:  # also where all the tokens went into thoughts
        return "cut"
    words = _words(rewrite)
    if not words:
        return "empty"
    if len(rewrite.splitlines()) > 1:
        return "lines"
    said, had = rewrite.replace("’", "'"), original.replace("’", "'")
    for reason, pattern in (("refusal", _REFUSAL), ("chatter", _CHATTER), ("markup", _MARKUP)):
        if pattern.search(said) and not pattern.search(had):
            return reason
    arrow = "=>" in rewrite and (prompt or "=>" not in original)  # a prompt shows none of its own
    if arrow or any(words == _words(text) for text in prompt):
        return "prompt"
    if words == _words(original):
        return "echo"
    if _repeats(words):
        return "repetition"
    if len(rewrite) > max(MAX_CHARACTERS, 2 * len(original)):
        return "long"
    if _foreign(rewrite, original):
        return "script"
    if invented:
        if set(_NUMBER.findall(rewrite)) - set(_NUMBER.findall(original)):
            return "number"
        if _names(rewrite) - set(_words(original)):
            return "name"
    if similarity is not None and least is not None and similarity < least:
        return "meaning"
    return None


def _words(text: str) -> list[str]:
    """Words and numbers, without case, accents' forms and punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _repeats(words: list[str]) -> bool:
    """Three words in the same order three times, a word four times on end, or few different."""
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    if triples and max(triples.values()) >= 3:
        return True
    if any(len(set(words[i : i + 4])) == 1 for i in range(len(words) - 3)):
        return True
    return len(words) >= 12 and len(set(words)) < 0.4 * len(words)


def _foreign(rewrite: str, original: str) -> bool:
    """More than a tenth of the letters in scripts that the original does not use."""
    found = Counter(_script(letter) for letter in rewrite if letter.isalpha())
    known = {_script(letter) for letter in original if letter.isalpha()}
    foreign = sum(count for script, count in found.items() if script not in known)
    return foreign > 0.1 * sum(found.values())


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    """LATIN, CYRILLIC, CJK, ...: the first word of the character's name."""
    script = unicodedata.name(letter, "unknown").split(" ", 1)[0]
    return {"HIRAGANA": "CJK", "KATAKANA": "CJK", "FULLWIDTH": "LATIN"}.get(script, script)


def _names(text: str) -> set[str]:
    """Words with a capital that do not begin a sentence, unless most words have one."""
    words = _WORD.findall(text)
    capitals = [
        match.group()
        for match in _WORD.finditer(text)
        if match.group()[0].isupper()
        and match.start() > 0
        and not re.search(r"[.!?:]\W*$", text[: match.start()])
        and match.group().removesuffix("'s") != "I"
    ]
    if len(capitals) > len(words) / 2:
        return set()
    return {word for capital in capitals for word in _words(capital.removesuffix("'s"))}
