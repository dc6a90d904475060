"""Where a step's time goes, measured without making the GPU wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from aicsd_deploy.files import atomic_path
from aicsd_deploy.memory import peak_resident_bytes

T = TypeVar("T")


class Phase(Protocol):
    """Opens a part of a step by name: student, teacher, losses, backward or optimizer."""

    def __call__(self, name: str, /) -> AbstractContextManager[None]: ...


PROFILED_STEPS = 5
WAITING = 0.2
"""A GPU that waits for data for more than this share of the time could be faster with more workers."""


def untimed(_name: str) -> AbstractContextManager[None]:
    """Stand in for `StepClock.phase` where nobody wants to know."""
    return nullcontext()


class StepClock:
    """Adds up the time of each phase and of whole steps since the last reading.

    On a GPU the phases are marked with events in its stream and read when a line of the log is due, so that no step waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, for example after a validation."""
        self._spans: list[tuple[str, Any, Any]] = []
        self._data_s, self._steps, self._since = 0.0, 0, time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside; the name is also seen in a profile."""
        with torch.profiler.record_function(name):
            start = self._mark()
            yield
            self._spans.append((name, start, self._mark()))

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and count the time that each is waited for."""
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._data_s += time.monotonic() - start
            self._steps += 1
            yield batch

    def read(self, *, batch_size: int, steps_left: int) -> dict[str, Any]:
        """Return speed, and the milliseconds of each phase of a mean step, since the last reading; start anew.

        `data_share` is the share of the time in which the network had to wait for a batch.
        """
        if self._cuda:
            torch.cuda.synchronize()
        elapsed, steps = time.monotonic() - self._since, max(self._steps, 1)
        phases = {"data": 1e3 * self._data_s / steps}
        for name, start, end in self._spans:
            spent_ms = start.elapsed_time(end) if self._cuda else 1e3 * (end - start)
            phases[name] = phases.get(name, 0.0) + spent_ms / steps
        share = self._data_s / elapsed
        self.restart()
        return {
            "speed": {
                "images_per_s": round(steps * batch_size / elapsed, 2),
                "data_share": round(share, 4),
                "peak_memory_gib": round(peak_memory_gib(cuda=self._cuda), 3),
                "eta_s": round(steps_left * elapsed / steps, 1),
            },
            "step_ms": {name: round(value, 3) for name, value in phases.items()},
        }

    def _mark(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def peak_memory_gib(*, cuda: bool) -> float:
    """Return the most memory that was in use so far: tensors on the GPU, or the whole process on the CPU."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return (peak_resident_bytes() or 0) / 2**30


@contextmanager
def profiled(path: Path | None, *, steps: int) -> Iterator[Callable[[], None]]:
    """Record a few steps into a Chrome trace at `path`; with None nothing is recorded.

    Args:
        path: the trace.
        steps: how many there will be. The first three are passed over, or all but one where there are fewer than four.

    Yields:
        What is to be called after each step.
    """
    if path is None or steps < 1:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        with atomic_path(path) as temporary:
            profiler.export_chrome_trace(str(temporary))

    passed = min(3, steps - 1)
    schedule = torch.profiler.schedule(wait=max(passed - 2, 0), warmup=min(passed, 2), active=PROFILED_STEPS, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
