"""The line on a terminal that tells how far a run is."""

import sys
import time


class Progress:
    """Captions done, captions and tokens a second, accepted, time left. Silent off a terminal."""

    def __init__(self, total: int | None, shards: int):
        self.total, self.shards = total, shards
        self.captions = self.accepted = self.tokens = self.shards_done = 0
        self.fresh = 0  # captions of this run
        self.begin = time.monotonic()
        self.shown = 0.0
        self.on = sys.stderr.isatty()

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
        if not self.on or now - self.shown < 0.5:
            return
        self.shown = now
        seconds = max(now - self.begin, 1e-9)
        rate = self.fresh / seconds
        text = f"\rrewrite: {self.captions:,}"
        text += f"/{self.total:,}" if self.total else ""
        text += f" captions, {self.shards_done}/{self.shards} shards, {rate:,.1f} captions/s"
        text += f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        text += f", {self.accepted / max(self.captions, 1):.1%} accepted"
        if self.total and rate:
            left = int(max(self.total - self.captions, 0) / rate)
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        sys.stderr.write(text + " \x1b[K")
        sys.stderr.flush()

    def close(self) -> None:
        if self.on:
            sys.stderr.write("\n")
