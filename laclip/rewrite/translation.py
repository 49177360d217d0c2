"""Back-translation, a baseline of the paper: into another language and back, by Apertium."""

import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice

from laclip.rewrite.engine import Answer, Request

LINES = 1000  # translated by one start of the program


class BackTranslation:
    """Translates English captions there and back; the result depends on the caption alone."""

    def __init__(self, language: str):
        """language: Apertium's name of it, such as spa; its package is apertium-eng-spa."""
        self.directions = f"eng-{language}", f"{language}-eng"
        known: list[str] = []
        if shutil.which("apertium"):
            listed = subprocess.run(["apertium", "-l"], capture_output=True, text=True)
            known = listed.stdout.split()
        if not set(self.directions) <= set(known):
            raise ValueError(
                f"--method backtranslate needs Apertium's {' and '.join(self.directions)}, found "
                f"{', '.join(known) or 'none'}. Run: apt-get install apertium-eng-{language}"
            )

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Answer]]:
        while chunk := list(islice(requests, LINES)):
            lines = [" ".join(request.caption.split()) for request in chunk]
            for direction in self.directions:
                lines = translate(lines, direction)
            for request, line in zip(chunk, lines, strict=True):
                yield request, Answer(line)


def translate(lines: list[str], direction: str) -> list[str]:
    """Each line in the other language; raises OSError when Apertium fails.

    What Apertium does to one line never reaches another: a blank line between them ends a sentence
    for it (without one it moves words from line to line, and capitals follow the first). Where the
    number of lines changes, they are translated in halves; one that becomes several is joined.
    """
    command = ["apertium", "-u", direction]  # -u: no marks at unknown words
    given = "".join(line + "\n\n" for line in lines).encode(errors="replace")
    done = subprocess.run(command, input=given, capture_output=True)
    if done.returncode:
        said = done.stderr[-300:].decode(errors="replace").strip()
        raise OSError(f"{' '.join(command)}: exit code {done.returncode}: {said}")
    found = done.stdout.decode(errors="replace").removesuffix("\n\n").split("\n\n")
    if len(found) == len(lines):
        return [_with_case_of(line, text.strip()) for line, text in zip(lines, found, strict=True)]
    if len(lines) == 1:
        return [" ".join(found)]
    middle = len(lines) // 2
    return translate(lines[:middle], direction) + translate(lines[middle:], direction)


def _with_case_of(line: str, text: str) -> str:
    """The text with its first letter as large or small as the line's."""
    first = next((letter for letter in line if letter.isalpha()), "")
    place = next((i for i, letter in enumerate(text) if letter.isalpha()), None)
    if place is None or not first:
        return text
    letter = text[place].upper() if first.isupper() else text[place].lower()
    return text[:place] + letter + text[place + 1 :]
