"""Back-translation, a baseline of the paper: into another language and back.

By Apertium, or by two translation models.
"""

import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice

import torch

from laclip.rewrite.engine import Answer, Request
from laclip.rewrite.model_folder import load_model

LINES = 1000  # translated by one start of the program
SORTED = 16  # batches whose texts are sorted by length, so that little is padding
MAX_TOKENS = 256  # of a text, and of its translation


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


class ModelTranslation:
    """Translates captions there and back by two models of one direction each, as Marian's are.

    They take the likeliest token each time, whatever beams their folders ask for: what a search by
    beams finds for a text changes with the texts beside it. So the result depends on the caption
    alone (but for rounding, which padding changes).
    """

    def __init__(self, folders: tuple[str, ...], batch_size: int = 16):
        """folders: of the model into the other language, and of the one back."""
        self.batch_size = batch_size
        self._models = [
            load_model(folder, "AutoModelForSeq2SeqLM", "--translators") for folder in folders
        ]
        for folder, (tokenizer, _) in zip(folders, self._models, strict=True):
            if getattr(tokenizer, "src_lang", None):
                raise ValueError(
                    f"--translators {folder}: a model of many languages; expected one of one "
                    "direction, such as Marian's opus-mt-en-de"
                )

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Answer]]:
        while chunk := list(islice(requests, SORTED * self.batch_size)):
            chunk.sort(key=lambda request: len(request.caption))
            for begin in range(0, len(chunk), self.batch_size):
                batch = chunk[begin : begin + self.batch_size]
                lines = [" ".join(request.caption.split()) for request in batch]
                answers = [Answer(line) for line in lines]
                for tokenizer, model in self._models:
                    answers = _translated(answers, tokenizer, model)
                yield from zip(batch, answers, strict=True)


@torch.inference_mode()
def _translated(answers: list[Answer], tokenizer, model) -> list[Answer]:
    """Each text in the model's other language; tokens add up, what was cut stays so."""
    texts = [answer.text for answer in answers]
    given = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    ids = model.generate(
        **given.to(model.device), max_new_tokens=MAX_TOKENS, do_sample=False, num_beams=1
    )
    ends = torch.tensor(model.generation_config.eos_token_id, device=ids.device)
    whole = torch.isin(ids, ends).any(1).tolist()
    tokens = (ids != tokenizer.pad_token_id).sum(1).tolist()
    found = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        Answer(text.strip(), before.tokens + count, cut=before.cut or not ended)
        for text, before, count, ended in zip(found, answers, tokens, whole, strict=True)
    ]
