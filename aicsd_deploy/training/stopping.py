"""A scheduler's request to stop: finish the step, save, and end with a code that asks to be started again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from aicsd_deploy.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Kubernetes and Slurm send some time before they kill."""


class StopRequest:
    """While it is open, SIGTERM and SIGUSR1 raise `Preempted`: at once, or, inside `held`, when the loop asks for it."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._holds = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
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
        """Raise Preempted if there was a request."""
        if self.received is not None:
            raise Preempted(f"stopped by {self.received}")

    @contextmanager
    def _holding(self, holds: bool) -> Iterator[None]:
        before, self._holds = self._holds, holds
        try:
            yield
        finally:
            self._holds = before

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self._holds:
            self.raise_if_received()
