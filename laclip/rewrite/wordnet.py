"""Easy data augmentation, a baseline of the paper: synonyms, insertion, swap, deletion.

Wei and Zou, "EDA: Easy data augmentation techniques for boosting performance on text
classification tasks" (EMNLP 2019). Synonyms come from WordNet's own files.
"""

import mmap
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from laclip import _native
from laclip.rewrite.engine import Answer, Request

FOLDER = Path("/usr/share/wordnet")
STRENGTH = 0.1  # of the words that an operation changes; one at least
_PARTS = ("noun", "verb", "adj", "adv")
_STREAM = 0x6561736479646174  # keeps these random numbers apart from all others
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_FUNCTION_WORDS = (
    "a about above after all also am an and any are as at be been before being below between both "
    "but by can could did do does down during each few for from had has have he her here his how i "
    "if in into is it its just like may me might more most must my no nor not of off on once only "
    "or other our out over own same shall she should so some such than that the their them then "
    "there these they this those through to too under up upon us very was we were what when where "
    "which while who whom why will with without would you your"
)


class EasyAugmentation:
    """Changes a caption by one of EDA's four operations, drawn by the request's seed."""

    def __init__(self, folder: str | Path = FOLDER):
        self._wordnet = WordNet(Path(folder))

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            yield request, Answer(self.change(request.caption, request.seed))

    def change(self, caption: str, seed: int) -> str:
        """A function of the caption and the seed alone."""
        words = caption.split()
        below = _draws(seed)
        count = max(1, int(STRENGTH * len(words)))
        operation = below(4)
        if operation == 0:
            return " ".join(self._replace(words, count, below))
        if operation == 1:
            return " ".join(self._insert(words, count, below))
        if operation == 2 and len(words) > 1:
            for _ in range(count):
                i, j = below(len(words)), below(len(words) - 1)
                j += j >= i
                words[i], words[j] = words[j], words[i]
        elif operation == 3 and len(words) > 1:
            kept = [word for word in words if below(1000) >= 1000 * STRENGTH]
            words = kept or [words[below(len(words))]]
        return " ".join(words)

    def _replace(self, words: list[str], count: int, below) -> list[str]:
        changed = list(words)
        for place in _some(self._places(words), count, below):
            match = _WORD.search(words[place])
            assert match is not None
            synonym = self._synonym(match.group(), below)
            changed[place] = words[place][: match.start()] + synonym + words[place][match.end() :]
        return changed

    def _insert(self, words: list[str], count: int, below) -> list[str]:
        changed = list(words)
        for place in _some(self._places(words), count, below):
            match = _WORD.search(words[place])
            assert match is not None
            changed.insert(below(len(changed) + 1), self._synonym(match.group(), below))
        return changed

    def _places(self, words: list[str]) -> list[int]:
        """Where words stand that have synonyms."""
        found = [_WORD.search(word) for word in words]
        return [i for i, m in enumerate(found) if m and self._wordnet.synonyms(m.group().lower())]

    def _synonym(self, word: str, below) -> str:
        synonyms = self._wordnet.synonyms(word.lower())
        return synonyms[below(len(synonyms))]


class WordNet:
    """Synonyms from the files index.* and data.* of WordNet 3 (format: wndb(5WN))."""

    def __init__(self, folder: Path):
        self._lines: dict[str, list[tuple[str, int]]] = {}  # word: its synsets' places
        self._data = {}
        self._function_words = frozenset(_FUNCTION_WORDS.split())
        for part in _PARTS:
            try:
                index = (folder / f"index.{part}").read_bytes().decode()
                with open(folder / f"data.{part}", "rb") as file:
                    self._data[part] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error.filename}: no such file. --method eda takes synonyms from WordNet: "
                    "apt-get install wordnet-base, or --wordnet FOLDER"
                ) from None
            for line in index.splitlines():
                if not line.startswith(" "):  # the licence
                    cells = line.split()
                    places = cells[-int(cells[2]) :]
                    self._lines.setdefault(cells[0], []).extend((part, int(p)) for p in places)
        self.synonyms = lru_cache(maxsize=1 << 17)(self._synonyms)

    def _synonyms(self, word: str) -> tuple[str, ...]:
        """The other words of all synsets of a word, in WordNet's order; none for function words."""
        if word in self._function_words:
            return ()
        found: dict[str, None] = {}
        for part, place in self._lines.get(word, ()):
            data = self._data[part]
            cells = data[place : data.find(b"\n", place)].decode().split(" ")
            words = cells[4 : 4 + 2 * int(cells[3], 16) : 2]
            # Adjectives may end in their place, as in galore(ip).
            found |= dict.fromkeys(w.split("(")[0].replace("_", " ").lower() for w in words)
        found.pop(word, None)
        return tuple(found)


def _some(places: list[int], count: int, below) -> list[int]:
    """So many of the places, drawn without replacement."""
    left = list(places)
    return [left.pop(below(len(left))) for _ in range(min(count, len(left)))]


def _draws(seed: int):
    """below(n): the next number in [0, n) of the seed's stream."""
    step = 0

    def below(bound: int) -> int:
        nonlocal step
        step += 1
        return _native.philox([seed, step, _STREAM, 0], 0, 0)[0] * bound >> 64

    return below
