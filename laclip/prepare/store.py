"""A file of rewrites as arrays that any number of processes map: text by identity, at random.

16 million texts take 400 MB of arrays beside their bytes, and none of it is held in memory.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from laclip import _native


class TextStore:
    """Texts by identity (see sources.py). Build once, then open in every process."""

    def __init__(self, folder: Path):
        self.hashes = _map(folder / "hashes", np.uint64)  # sorted
        self._order = _map(folder / "order", np.int64)
        self._ends = _map(folder / "ends", np.int64).reshape(-1, 3)
        self._bytes = _map(folder / "bytes", np.uint8)

    def __len__(self) -> int:
        return len(self.hashes)

    def find(self, identities: Sequence[str | None]) -> tuple[list[str | None], np.ndarray]:
        """The text of each identity or None, and the numbers of the texts that were found."""
        known = [identity.encode() for identity in identities if identity is not None]
        wanted = hash_strings(known)
        places = np.searchsorted(self.hashes, wanted)
        inside = np.minimum(places, max(len(self) - 1, 0))
        hits = (self.hashes[inside] == wanted) if len(self) else np.zeros(len(known), bool)
        numbers = self._order[inside] if len(self) else inside
        spans = self._ends[numbers].tolist() if len(self) else [[0, 0, 0]] * len(known)
        data = self._bytes.data
        answers: list[str | None] = []
        found = []
        for i, (raw, hit, number, (begin, middle, end)) in enumerate(
            zip(known, hits.tolist(), numbers.tolist(), spans, strict=True)
        ):
            if hit and data[begin:middle] != raw:
                # Another identity of this hash. Equal hashes stand in the file's order.
                number, begin, middle, end = self._search(raw, int(places[i]))
                hit = number >= 0
            answers.append(str(data[middle:end], "utf-8") if hit else None)
            if hit:
                found.append(number)
        answered = iter(answers)
        texts = [None if identity is None else next(answered) for identity in identities]
        return texts, np.array(found, np.int64)

    def identity(self, number: int) -> str:
        """What text `number` is found by."""
        begin, middle, _ = self._ends[number].tolist()
        return self._bytes[begin:middle].tobytes().decode()

    def repeated(self) -> np.ndarray:
        """The numbers of the texts whose identity an earlier text has, which is the one found."""
        return self._order[1:][self.hashes[1:] == self.hashes[:-1]]

    def _search(self, raw: bytes, place: int) -> tuple[int, int, int, int]:
        hashed = self.hashes[place]
        while place < len(self) and self.hashes[place] == hashed:
            number = int(self._order[place])
            begin, middle, end = self._ends[number].tolist()
            if self._bytes[begin:middle].tobytes() == raw:
                return number, begin, middle, end
            place += 1
        return -1, 0, 0, 0


def build_store(folder: Path, pairs: Iterable[tuple[str, str]]) -> tuple[int, int]:
    """Write (identity, text) pairs as a store; returns the checksum and how many there are."""
    folder.mkdir()
    checksum, count, at = 0, 0, 0
    hashes = [np.zeros(0, np.uint64)]
    with open(folder / "bytes", "wb") as file, open(folder / "ends", "wb") as ends:
        batch: list[tuple[bytes, bytes]] = []

        def flush():
            nonlocal checksum, at
            blob = b"".join(part for pair in batch for part in pair)
            lengths = np.array([(len(a), len(b)) for a, b in batch], np.int64)
            stops = at + np.cumsum(lengths.ravel()).reshape(-1, 2)
            starts = np.concatenate([[at], stops[:-1, 1]])
            ends.write(np.column_stack([starts, stops]).data)
            hashes.append(hash_strings([identity for identity, _ in batch]))
            seed = np.frombuffer(
                checksum.to_bytes(8, "little") + lengths.tobytes() + blob, np.uint8
            )
            checksum = _native.xxh64(seed)
            file.write(blob)
            at += len(blob)
            batch.clear()

        for identity, text in pairs:
            batch.append((identity.encode(), text.encode(errors="replace")))
            count += 1
            if len(batch) == 100_000:
                flush()
        if batch:
            flush()
    all_hashes = np.concatenate(hashes)
    hashes.clear()
    order = np.argsort(all_hashes, kind="stable")
    for name, array in (("order", order), ("hashes", all_hashes[order])):
        with open(folder / name, "wb") as file:
            file.write(array.data)
    return checksum, count


def hash_strings(strings: Sequence[bytes]) -> np.ndarray:
    """XXH64 of each string, uint64."""
    ends = np.cumsum([len(string) for string in strings], dtype=np.uint64)
    if len(ends) and ends[-1] > 0xFFFFFFFF:
        middle = len(strings) // 2
        return np.concatenate([hash_strings(strings[:middle]), hash_strings(strings[middle:])])
    whole = np.frombuffer(b"".join(strings), np.uint8)
    return _native.hash_slices(whole, ends.astype(np.uint32))


def _map(path: Path, dtype: type) -> np.ndarray:
    """A file as an array; an empty one cannot be mapped."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)
