"""Ends a job whose ranks cannot go on together, with the reason: no rank waits for a lost one.

Each rank's watchdog is a thread with a connection to the first rank's. A connection that closes
without a farewell is a rank that died: known at once. One that stays silent for the timeout is a
rank that was stopped or cut off. Beats also carry what the rank's main thread is doing, so that one
that hangs is named by the rank it hangs on, not by those that wait for it.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from laclip.parallel import JointError, Ranks, from_first

INTERVAL = 0.5  # seconds between beats
PATIENCE = 5.0  # seconds that an error of the network waits for the news of what caused it;
# also how late this thread may be before it takes itself for one that was stopped


class _Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket, rank: int):
        self.connection = connection
        self.rank = rank  # -1 until it has said who it is
        self.heard_at = time.monotonic()
        self.unread = b""
        self.count, self.doing, self.advanced_at = 0, "starting", time.monotonic()

    def send(self, *message: str | int) -> None:
        with contextlib.suppress(OSError):  # reading tells why
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list] | None:
        """The messages that came, or None where the connection has ended."""
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        self.heard_at = time.monotonic()
        *lines, self.unread = (self.unread + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines] if data else None
        except ValueError:
            return None


class Watchdog:
    """Watches the ranks of a job; a context manager around what they do together.

    timeout_seconds: how long a rank may be silent, or stand at one piece of work. give_up: called
    in the watchdog's thread with the reason and whether this rank is to report it; it must not
    return. on_orphaned: called once when DeepSpeed's launcher, or what started it, is gone.
    """

    def __init__(
        self,
        ranks: Ranks,
        timeout_seconds: float,
        give_up: Callable[[str, bool], None],
        on_orphaned: Callable[[], None],
    ):
        self._ranks, self._timeout = ranks, timeout_seconds
        self._give_up, self._on_orphaned = give_up, on_orphaned
        self._count, self._doing, self._advanced_at = 0, "starting", time.monotonic()
        self._ancestors = launcher_ancestors()
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._lock = threading.Lock()  # both threads send, over connections that come and go
        host, meeting = os.environ["MASTER_ADDR"], None
        if ranks.is_first:
            family = socket.getaddrinfo(host, None)[0][0]
            self._listener = socket.create_server(("", 0), family=family)
            self._selector.register(self._listener, selectors.EVENT_READ)
            meeting = self._listener.getsockname()[1], secrets.token_hex()
        port, self._token = from_first(meeting)
        if not ranks.is_first:
            self._add(socket.create_connection((host, port), timeout=60), 0)
            self._send("hello", self._token, ranks.rank)
        self._advanced_at = time.monotonic()  # the others may have kept this one waiting
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """Say what this rank's main thread does next; every rank says the same things in order."""
        self._count, self._doing, self._advanced_at = self._count + 1, what, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if not faulthandler.is_enabled():
            faulthandler.enable()  # a mapped file that was cut, say, ends the process: "Bus error"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, JointError):
            if type(error) is RuntimeError or isinstance(error, dist.DistError):
                # Perhaps another rank left and the network said so first.
                self._thread.join(PATIENCE)
            reason = f"rank {self._ranks.rank} failed: {type(error).__name__}: {error}"
            self._closing = True  # what the others answer is no news here
            self._send("end", reason, self._ranks.rank)
        self._closing = True
        self._thread.join()

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(1.0)
        with self._lock:
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection, rank))

    def _peers(self) -> list[_Peer]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _send(self, *message: str | int) -> None:
        with self._lock:
            for peer in self._peers():
                if peer.rank >= 0:
                    peer.send(*message)

    def _watch(self) -> None:
        beat_at, looked_at = 0.0, time.monotonic()
        while not self._closing:
            for key, _ in self._selector.select(INTERVAL):
                if key.data is None:
                    self._add(self._listener.accept()[0], -1)
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if now - looked_at > PATIENCE:
                self._forgive(now - looked_at)
            looked_at = now
            if now - beat_at >= INTERVAL:
                beat_at = now
                self._send("beat", self._count, self._doing)
                self._judge(now)
                if self._ancestors and self._ancestors != launcher_ancestors():
                    self._ancestors = []
                    self._on_orphaned()
        self._send("bye")
        for peer in self._peers():
            try:
                # What is unread at the close of a connection would take the farewell with it.
                peer.connection.shutdown(socket.SHUT_WR)
                while peer.connection.recv(65536):
                    pass
            except OSError:
                pass
            peer.connection.close()
        if self._ranks.is_first:
            self._listener.close()
        self._selector.close()

    def _forgive(self, seconds: float) -> None:
        """This process was stopped (Ctrl-Z) and goes on: a time in which it heard nobody."""
        self._advanced_at += seconds
        for peer in self._peers():
            peer.heard_at += seconds
            peer.advanced_at += seconds

    def _hear(self, peer: _Peer) -> None:
        messages = peer.receive()
        for kind, *rest in messages or []:
            if peer.rank < 0:
                if kind != "hello" or rest[0] != self._token:
                    messages = None  # a stranger
                    break
                peer.rank = rest[1]
            elif kind == "beat":
                if rest[0] != peer.count:
                    peer.count, peer.doing, peer.advanced_at = *rest, time.monotonic()
            elif kind == "bye":
                self._drop(peer)
                return
            elif kind == "end":
                self._end(*rest)
        if messages is None:
            self._drop(peer)
            if peer.rank >= 0:
                self._end(f"rank {peer.rank} died, last known to be {peer.doing}", peer.rank)

    def _drop(self, peer: _Peer) -> None:
        with self._lock:
            self._selector.unregister(peer.connection)
        peer.connection.close()

    def _judge(self, now: float) -> None:
        peers = [peer for peer in self._peers() if peer.rank >= 0]
        for peer in peers:
            silent = now - peer.heard_at
            if silent > self._timeout:
                self._end(
                    f"rank {peer.rank} was silent for {silent:.0f} s, last known to be "
                    f"{peer.doing}: stopped, or cut off from the network",
                    peer.rank,
                )
        if not self._ranks.is_first:
            return
        if any(now - peer.heard_at > 4 * INTERVAL for peer in peers):
            return  # what it does is not known: its silence will tell
        everyone = [(self._count, self._advanced_at, 0, self._doing)]
        everyone += [(peer.count, peer.advanced_at, peer.rank, peer.doing) for peer in peers]
        count, advanced_at, rank, doing = min(everyone)
        if now - advanced_at > self._timeout:
            who = f"rank {rank}" if count < max(everyone)[0] else "every rank"
            self._end(f"{who} has been {doing} for {now - advanced_at:.0f} s", -1)

    def _end(self, reason: str, lost: int) -> None:
        """Tell the others and leave; the lowest rank that is left reports."""
        if self._closing:
            return
        if self._ranks.is_first:
            self._send("end", reason, lost)
        self._give_up(reason, self._ranks.rank == (1 if lost == 0 else 0))


def launcher_ancestors() -> list[int]:
    """The process ids of DeepSpeed's node launcher and of what started it; [] without one."""
    try:
        parent = os.getppid()
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        if b"deepspeed.launcher.launch" not in words:
            return []
        # pid (name) state parent ...; the name may hold spaces and parentheses
        return [parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])]
    except OSError:
        return []
