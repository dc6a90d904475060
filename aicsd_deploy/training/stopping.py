"""A request to stop: finish the step, save, and end, where a scheduler asked with a code that says to start it again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from aicsd_deploy.errors import Interrupted, Preempted

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}
"""What Kubernetes and Slurm send some time before they kill, and what somebody at the keyboard sends."""


class StopRequest:
    """While it is open, the signals raise `Preempted`: at once, or, inside `held`, when the loop asks for it.

    A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._holds = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            for number in SIGNALS:
                # A job in the background, for which the shell has Ctrl-C ignored, is not meant by it.
                if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Do not interrupt what is done inside."""
        with self._holding(True):
            yield

    @contextmanager
    def released(self) -> Iterator[None]:
        """Interrupt what is done inside, at once if the request came before."""
        with self._holding(False):
            self.raise_if_received()
            yield

    def raise_if_received(self) -> None:
        """Raise Preempted, of Ctrl-C Interrupted, if there was a request."""
        if self.received is not None:
            kind = Interrupted if self.received == SIGNALS[signal.SIGINT] else Preempted
            raise kind(f"stopped by {self.received}")

    @contextmanager
    def _holding(self, holds: bool) -> Iterator[None]:
        before, self._holds = self._holds, holds
        try:
            yield
        finally:
            self._holds = before

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = self.received or SIGNALS[signal.Signals(number)]
        if not self._holds:
            self.raise_if_received()
