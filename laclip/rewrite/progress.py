"""The line on a terminal that tells how far a run is."""

import sys
import time
from collections import deque

RATE_SECONDS = 120.0  # whose rates are told: an outage of the past says nothing of the time left


class Progress:
    """Captions done, captions and tokens a second, accepted, time left.

    One line on a terminal's stderr, elsewhere a line a minute.
    """

    def __init__(self, total: int | None, shards: int):
        self.total, self.shards = total, shards
        self.captions = self.accepted = self.tokens = self.shards_done = 0
        self.fresh = 0  # captions of this run
        self.shown = time.monotonic()
        self.points = deque([(self.shown, 0, 0)])  # when this run had so many captions and tokens
        self.terminal = sys.stderr.isatty()

    def answer(self, accepted: bool, tokens: int | None) -> None:
        """One caption; tokens is None for what an earlier run did."""
        self.captions += 1
        self.accepted += accepted
        if tokens is not None:
            self.tokens += tokens
            self.fresh += 1
        self._show()

    def earlier(self, entry: dict) -> None:
        """A shard that an earlier run finished."""
        self.captions += entry["accepted"] + sum(entry["rejected"].values())
        self.accepted += entry["accepted"]
        self.shards_done += 1

    def finished(self, entry: dict, answered: bool) -> None:
        """A shard of this run has ended; `answered` where each answer was told before."""
        if not answered:
            self.earlier(entry)
            self.fresh += entry["captions"] - entry["duplicate_keys"]
            self.tokens += entry["tokens"]
            self._show()
        else:
            self.shards_done += 1

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.shown >= (0.5 if self.terminal else 60):
            self.shown = now
            line = self.line(now)
            sys.stderr.write(f"\r{line} \x1b[K" if self.terminal else f"{line}\n")
            sys.stderr.flush()

    def line(self, now: float) -> str:
        """What there is to tell at this time of time.monotonic, later than at the last call."""
        self.points.append((now, self.fresh, self.tokens))
        while len(self.points) > 2 and now - self.points[1][0] >= RATE_SECONDS:
            self.points.popleft()
        begin, captions, tokens = self.points[0]
        seconds = max(now - begin, 1e-9)
        rate = (self.fresh - captions) / seconds
        text = f"rewrite: {self.captions:,}"
        text += f"/{self.total:,}" if self.total else ""
        text += f" captions, {self.shards_done}/{self.shards} shards, {rate:,.1f} captions/s"
        text += f", {(self.tokens - tokens) / seconds:,.0f} tokens/s" if self.tokens else ""
        text += f", {self.accepted / max(self.captions, 1):.1%} accepted"
        if self.total and rate:
            left = int(max(self.total - self.captions, 0) / rate)
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text

    def close(self) -> None:
        if self.terminal:
            sys.stderr.write(f"\r{self.line(time.monotonic())} \x1b[K\n")
