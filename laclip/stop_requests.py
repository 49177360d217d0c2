"""What asks a rank to stop: signals, or the end of its launcher."""

import signal
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
STOPS = (*(f"stopped by {name}" for name in SIGNALS), "stopped: its launcher is gone")
stops: set[str] = set()  # what this rank was asked; all ranks agree on it in every step


def catch_signals() -> None:
    """The first of SIGNALS asks for a checkpoint and an end; more of them change nothing."""

    def remember(number: int, _frame: Any) -> None:
        stops.add(f"stopped by {signal.Signals(number).name}")

    for number in map(signal.Signals.__getitem__, SIGNALS):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, remember)
