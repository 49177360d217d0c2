"""Prompts: an instruction, three example pairs, the caption (LaCLIP, section 3.2)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laclip import _native
from laclip.rewrite import pairs

BUILT_IN = {
    "plain": pairs.PLAIN,
    "detailed": pairs.DETAILED,
    "brief": pairs.BRIEF,
    "lively": pairs.LIVELY,
}
EXAMPLES = 3  # shown of a set's pairs
INSTRUCTION = "Rewrite each image caption differently."  # of a set that brings none
MAX_CHARACTERS = 600  # of a caption that a prompt shows: longer ones are cut between words
_STREAM = 0x7265777269746573  # keeps these random numbers apart from those of training


@dataclass(frozen=True)
class PromptSet:
    """Pairs of captions and their rewrites, with the line that asks for such."""

    name: str
    instruction: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def fingerprint(self) -> str:
        text = json.dumps([self.instruction, self.pairs])
        return f"{_hash(text):016x}"

    def draw(self, key: str, seed: int) -> tuple[list[tuple[str, str]], int]:
        """The example pairs of a caption and the seed (31 bits) that its answer is sampled with.

        Both are a function of the set, the caption's key and the run's seed alone; the pairs are
        drawn without replacement.
        """
        words = draw_words(key, self.name, seed)
        left = list(self.pairs)
        chosen = [left.pop(word * len(left) >> 64) for word in words[:EXAMPLES]]
        return chosen, words[3] >> 33

    def text(self, caption: str, examples: list[tuple[str, str]]) -> str:
        """The prompt of the paper, for a model that completes text; the answer is its next line."""
        lines = [f"{source} => {target}" for source, target in examples]
        return "\n".join([self.instruction, "", *lines, f"{clean(caption)} =>"])

    def messages(self, caption: str, examples: list[tuple[str, str]]) -> list[dict[str, str]]:
        """The same as a chat, for a model that was tuned on instructions."""
        ask = f"{self.instruction} Answer with the new caption alone, on one line."
        chat = [{"role": "system", "content": ask}]
        for source, target in examples:
            chat.append({"role": "user", "content": source})
            chat.append({"role": "assistant", "content": target})
        return [*chat, {"role": "user", "content": clean(caption)}]


def draw_words(key: str, name: str, seed: int) -> list[int]:
    """Four random words of 64 bits for a caption, of the run's seed and a set or method."""
    return _native.philox([_hash(key), _hash(name), _STREAM, 0], seed, 0)


def clean(caption: str) -> str:
    """A caption as a prompt may hold it: one line, without the prompt's own arrow, not too long."""
    line = " ".join(caption.replace("=>", " ").split())
    if len(line) <= MAX_CHARACTERS:
        return line
    head = line[: MAX_CHARACTERS + 1].rsplit(" ", 1)[0]
    return head[:MAX_CHARACTERS]


def load_prompts(spec: str) -> PromptSet:
    """A built-in set by its name, or a user's from a JSONL file.

    The file has one pair a line, {"source": ..., "target": ...}, at least four of them, and may
    begin with {"instruction": ...}. Raises ValueError with the line that does not fit.
    """
    if spec in BUILT_IN:
        instruction, *lines = BUILT_IN[spec].strip().splitlines()
        return PromptSet(spec, instruction, _pairs(zip(lines[::2], lines[1::2], strict=True)))
    path = Path(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"--prompts {spec}: neither a file nor a built-in set ({', '.join(BUILT_IN)})"
        )
    instruction, found = INSTRUCTION, []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if number == 1 and set(entry) == {"instruction"}:
                instruction = " ".join(entry["instruction"].split())
            else:
                found.append((entry["source"], entry["target"]))
                if not all(clean(text) for text in found[-1]):
                    raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{path}: line {number}: found {line[:80]!r}, expected {{"source": "...", '
                '"target": "..."}'
            ) from None
    if len(found) <= EXAMPLES:
        raise ValueError(
            f"{path}: {len(found)} pairs; a prompt shows {EXAMPLES} drawn from more than that"
        )
    return PromptSet(path.stem, instruction, _pairs(found))


def _pairs(found) -> tuple[tuple[str, str], ...]:
    return tuple((clean(source), clean(target)) for source, target in found)


def _hash(text: str) -> int:
    return _native.xxh64(np.frombuffer(text.encode(errors="surrogatepass"), np.uint8))
