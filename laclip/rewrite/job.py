"""A run over shards of captions that may be killed at any moment and started again.

In the folder of a run:

    job.json                what the run is: another one in this folder is refused
    parts/SHARD.jsonl       a line for every caption that is done, appended as answers come
    shards/SHARD.jsonl      the rewrites of a finished shard, in the order of its captions
    rejects/SHARD.jsonl     what was rejected there, and why
    finished.jsonl          a line for every finished shard, with its counts
    set_aside.json          shards that the last run could not finish, and why
    rewrites.jsonl          the rewrites of all finished shards: what `laclip tokenize` takes
    report.html             figures and samples
"""

import fcntl
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laclip.rewrite.captions import CaptionShard
from laclip.rewrite.engine import Answer, Request
from laclip.rewrite.filters import reject, tidy, unfit
from laclip.rewrite.prompts import PromptSet, draw_words
from laclip.whole_files import whole_file

SYNC_SECONDS = 1.0  # of work that a power cut may cost; a kill costs none


@dataclass(frozen=True)
class Plan:
    """What is done to each caption, whatever the engine."""

    folder: Path
    model: str  # or the method that needs none
    seed: int
    prompts: PromptSet | None = None  # of a language model
    invented: bool = False  # reject numbers and names that the original does not have
    least: float | None = None  # similarity in meaning, where the engine measures it

    def draw(self, key: str) -> tuple[list[tuple[str, str]], int]:
        """The examples and the seed of a caption."""
        if self.prompts is not None:
            return self.prompts.draw(key, self.seed)
        return [], draw_words(key, self.model, self.seed)[3] >> 33


def open_folder(folder: Path, job: dict[str, Any]) -> None:
    """Fill the run's folder, or check that what is there is the same run; raises ValueError.

    A run that has nothing yet, such as one whose model could not be loaded, gives way to another.
    """
    path = folder / "job.json"
    there = path.exists()
    if there:
        try:
            before = json.loads(path.read_bytes())
        except ValueError:
            raise ValueError(f"{path}: not JSON; expected the job of a run of rewrites") from None
        changed = [name for name in job if before.get(name) != job[name]]
        begun = any(part.stat().st_size for part in (folder / "parts").glob("*.jsonl"))
        if changed and not begun and not read_finished(folder):
            there = False
        elif changed:
            told = "; ".join(f"{n}: {before.get(n)!r}, now {job[n]!r}" for n in changed)
            raise ValueError(f"{folder} holds another run ({told}). Name another folder")
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder}: there are files in it, but no job.json. Name another folder")
    if not there:
        with whole_file(path) as file:
            file.write(json.dumps(job, indent=2, ensure_ascii=False).encode() + b"\n")
    finished = folder / "finished.jsonl"
    with suppress(FileNotFoundError):
        os.truncate(finished, sum(size for _, size in read_lines(finished)))  # a line was cut off
    for name in ("parts", "shards", "rejects"):
        (folder / name).mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder; ends with the process, however that ends."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file; expected a folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work in it") from None
        yield


def read_finished(folder: Path) -> dict[str, dict]:
    """The counts of every finished shard, by its name."""
    finished = {}
    for entry, _ in read_lines(folder / "finished.jsonl"):
        if (folder / "shards" / f"{entry['shard']}.jsonl").exists():
            finished[entry["shard"]] = entry
    return finished


def record_finished(folder: Path, result: dict) -> None:
    """Enter a shard as finished; its part is not needed from then on."""
    with open(folder / "finished.jsonl", "ab") as file:
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    (folder / "parts" / f"{result['shard']}.jsonl").unlink(missing_ok=True)


def rewrite_shards(
    shards: Iterable[CaptionShard],
    plan: Plan,
    engine: Any,
    on_answer: Callable[[bool, int | None], None] = lambda accepted, tokens: None,
) -> Iterator[dict]:
    """Rewrite the captions of shards, and yield each shard's counts as it ends.

    engine: has answers(requests) -> (request, answer) pairs in any order. The captions of the next
    shards are on their way before a shard ends, so that an engine never runs dry. A shard that
    cannot be read or has a caption without an answer yields {"shard", "problem"}: its part stays,
    and the next run asks for what is missing. on_answer(accepted, tokens) is told of each
    caption; of one that an earlier run did, with None.
    """
    ended: list[_Shard] = []

    def requests() -> Iterator[Request]:
        for shard in shards:
            try:
                work = _Shard(shard, plan, on_answer)
            except BlockingIOError:
                continue  # another process has it
            yield from work.requests()
            if not work.waiting:
                ended.append(work)

    for request, answer in engine.answers(requests()):
        work = request.shard
        work.take(request, answer)
        if work.all_read and not work.waiting:
            ended.append(work)
        while ended:
            yield ended.pop(0).end()
    while ended:
        yield ended.pop(0).end()


class _Shard:
    """One shard at work: its part file, and what is still to come."""

    def __init__(self, shard: CaptionShard, plan: Plan, on_answer):
        self.shard, self.plan, self.on_answer = shard, plan, on_answer
        self.part = plan.folder / "parts" / f"{shard.name}.jsonl"
        self.file = open(self.part, "ab", buffering=0)  # noqa: SIM115 (closed in end)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise
        self.done: dict[int, int] = {}  # the hash of what was there, by its number
        whole = 0
        for entry, size in read_lines(self.part):
            self.done[entry["n"]] = hash((entry["key"], entry["source"]))
            whole += size
            on_answer("reason" not in entry, None)
        self.file.truncate(whole)  # a line that was cut off
        self.waiting, self.all_read, self.problem = 0, False, ""
        self.captions = self.duplicates = 0
        self.begin = self.synced = time.monotonic()

    def requests(self) -> Iterator[Request]:
        seen: set[str] = set()
        try:
            for number, (key, caption) in enumerate(self.shard.read()):
                self.captions += 1
                if key in seen:
                    self.duplicates += 1
                    continue
                seen.add(key)
                if number in self.done:
                    if self.done[number] != hash((key, caption)):
                        raise ValueError(
                            f"{self.shard.path}: its caption {number}, of key {key}, is another "
                            "than the one that this run had there before. Name another folder"
                        )
                    continue
                request = Request(self, number, key, caption, *self.plan.draw(key))
                if unfit(caption):
                    self._write(request, Answer(""), "unfit")
                    continue
                self.waiting += 1
                yield request
        except (ValueError, OSError) as error:
            self.problem = str(error)
        self.all_read = True

    def take(self, request: Request, answer: Answer) -> None:
        self.waiting -= 1
        if answer.failed:
            self.problem = self.problem or f"key {request.key}: {answer.text}"
            return
        prompts = self.plan.prompts
        shown = tuple(text for pair in request.examples for text in pair)
        text = tidy(answer.text)
        reason = (
            "refused"
            if answer.refused
            else reject(
                text,
                request.caption,
                cut=answer.cut,
                prompt=(*shown, prompts.instruction) if prompts else (),
                invented=self.plan.invented,
                similarity=answer.similarity,
                least=self.plan.least,
            )
        )
        self._write(request, replace(answer, text=text), reason)

    def _write(self, request: Request, answer: Answer, reason: str | None) -> None:
        entry: dict[str, Any] = {"n": request.number, "key": request.key, "text": answer.text}
        entry |= {"source": request.caption, "tokens": answer.tokens}
        if answer.similarity is not None:
            entry["similarity"] = answer.similarity
        if reason:
            entry["reason"] = reason
        line = as_line(entry)
        try:
            while line:  # a disk that fills takes a part, and fails on the rest
                line = line[self.file.write(line) :]
        except OSError as error:
            error.filename = str(self.part)
            raise
        now = time.monotonic()
        if now - self.synced > SYNC_SECONDS:
            os.fsync(self.file.fileno())
            self.synced = now
        self.on_answer(reason is None, answer.tokens)

    def end(self) -> dict:
        """Turn a complete part into the shard's files; returns its counts, or its problem."""
        try:
            if self.problem:
                os.fsync(self.file.fileno())
                return {"shard": self.shard.name, "problem": self.problem}
            return self._finish()
        finally:
            self.file.close()

    def _finish(self) -> dict:
        numbers, sizes, tokens, reasons = array("q"), array("q"), 0, Counter[str]()
        for entry, size in read_lines(self.part):
            numbers.append(entry["n"])
            sizes.append(size)
            tokens += entry["tokens"]
            reasons.update([entry["reason"]] if "reason" in entry else [])
        places = np.cumsum(sizes, dtype=np.int64) - np.asarray(sizes)
        plan, prompts, name = self.plan, self.plan.prompts, f"{self.shard.name}.jsonl"
        made: dict[str, Any] = {"model": plan.model, "prompts": prompts.name if prompts else None}
        made["seed"] = plan.seed
        with (  # the rewrites get their name last: with them the shard is finished
            whole_file(plan.folder / "shards" / name) as rewrites,
            whole_file(plan.folder / "rejects" / name) as rejects,
            open(self.part, "rb") as part,
        ):
            for place in places[np.argsort(numbers)]:
                part.seek(place)
                entry = json.loads(part.readline())
                kept = {k: v for k, v in entry.items() if k not in ("n", "tokens")}
                (rejects if "reason" in entry else rewrites).write(as_line(kept | made))
        return {
            "shard": self.shard.name,
            "captions": self.captions,
            "duplicate_keys": self.duplicates,
            "accepted": len(numbers) - reasons.total(),
            "rejected": dict(reasons.most_common()),
            "tokens": tokens,
            "seconds": round(time.monotonic() - self.begin, 3),
        }


def read_lines(path: Path) -> Iterator[tuple[dict, int]]:
    """The entries of a file that grows by whole lines, with their bytes, up to one cut off."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError:
                return  # written before a power cut, never synced
            yield entry, len(line)


def as_line(entry: dict) -> bytes:
    # A lone surrogate, which JSON's escapes may bring, has no UTF-8.
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode(errors="replace")
