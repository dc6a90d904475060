"""What joins the stages of a pipeline: bounded queues between threads, and one flag that stops them all."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What ends a run early: Ctrl-C, a request, or the terminal that is closed, for which Windows has no signal."""
_END: Any = object()
_POLL_S = 0.1  # how soon a stage that waits for its neighbour notices that all must stop


class Stop:
    """What tells all stages to stop: an error in one of them, Ctrl-C, or the viewer.

    It has no lock: a signal that came while its thread holds one would wait for it forever.
    """

    def __init__(self, *, also: Callable[[], None] = lambda: None) -> None:
        """`also` is called too when all must stop: it wakes a stage that waits outside the queues."""
        self.is_set = False
        self.error: BaseException | None = None
        self.interrupted = False
        self.signal: int | None = None
        self._also = also
        self._handlers: dict[int, Any] = {}

    def set(self) -> None:
        if not self.is_set:
            self.is_set = True
            self._also()

    def wait(self, seconds: float) -> None:
        """Wait for so long, or until all must stop."""
        end_s = time.monotonic() + seconds
        while not self.is_set and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _POLL_S))

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.set()

    def interrupt(self) -> None:
        self.interrupted = True
        self.set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # a job in the background ignores Ctrl-C
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        self.signal = number
        # An exception here could hit between two calls of the encoder; a flag is looked at between two frames.
        self.interrupt()
        self.__exit__()  # the second signal does what it does elsewhere


class Lane:
    """A bounded queue between two stages; with `newest`, a full one drops what is in it, and nobody waits."""

    def __init__(self, stop: Stop, depth: int, *, newest: bool) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop, self._newest = stop, newest

    def put(self, item: Any) -> bool:
        """Pass an item on; False says that all must stop."""
        while self._newest and self._queue.full():
            with suppress(queue.Empty):  # the taker was quicker
                self._queue.get_nowait()
        return self._put(item)

    def put_end(self) -> None:
        self._put(_END)

    def __iter__(self) -> Iterator[Any]:
        while not self._stop.is_set:
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if item is _END:
                return
            yield item

    def newer(self, item: Any, *, within_s: float) -> Any:
        """Return what comes next, or `item` if nothing comes within the time or before all must stop."""
        end_s = time.monotonic() + within_s
        while not self._stop.is_set and (left_s := end_s - time.monotonic()) > 0:
            try:
                found = self._queue.get(timeout=min(left_s, _POLL_S))
            except queue.Empty:
                continue
            if found is not _END:
                return found
            self.put_end()
            break
        return item

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set:
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_S)
                return True
        return False


class Fan:
    """Lanes side by side that take turns, so that several threads share a stage and the order is kept."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes, self._next = lanes, cycle(lanes)

    def put(self, item: Any) -> bool:
        """Pass an item on; False says that all must stop."""
        return next(self._next).put(item)

    def put_end(self) -> None:
        for lane in self._lanes:
            lane.put_end()

    def __iter__(self) -> Iterator[Any]:
        for items in cycle([iter(lane) for lane in self._lanes]):
            item = next(items, _END)
            if item is _END:
                return
            yield item
