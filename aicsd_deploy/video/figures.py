"""How long each stage takes for each frame, and the figures about it that viewers see."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from aicsd_deploy.video.sources import Frame

STAGES = ("decode", "infer", "render", "encode")
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_KEPT = 20_000  # times that are kept for the report: hours of video must not fill the memory
_RECENT = 60  # frames that the figures on the screen are taken over


@dataclass(frozen=True)
class Figures:
    """The figures over the last frames.

    Attributes:
        backend: what runs the network, and in which precision.
        fps: frames shown per second; 0 as long as too few have been to tell.
        p50_ms, p99_ms: inference, resizing included.
        dropped: frames of a live source that were not shown, since newer ones had come.
        age_ms: live sources: time from arrival until shown, of the last frame.
    """

    backend: str
    fps: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    dropped: int = 0
    age_ms: float | None = None

    def line(self) -> str:
        """Return them in one line of ASCII text."""
        if not self.fps:
            return self.backend
        live = "" if self.age_ms is None else f"   {self.dropped} dropped   {self.age_ms:.0f} ms old"
        return f"{self.fps:.1f} fps   {self.p50_ms:.1f} ms p50   {self.p99_ms:.1f} p99{live}   {self.backend}"


class Stopwatch:
    """Times the stages; each stage runs in its own thread."""

    def __init__(self, backend: str) -> None:
        self._kept_s: dict[str, deque[float]] = {name: deque(maxlen=_KEPT) for name in (*STAGES, "age")}
        self._counts = dict.fromkeys(self._kept_s, 0)
        self._shown_s: deque[float] = deque(maxlen=_RECENT)
        self._infer_s: deque[float] = deque(maxlen=_RECENT)
        self._figures, self._renewed_s = Figures(backend), 0.0
        self._lock = threading.Lock()  # several threads may infer

    def timed(self, stage: str, work: Callable[[_In], _Out]) -> Callable[[_In], _Out]:
        """Return `work`, each call of which is timed."""

        def timed_work(item: _In) -> _Out:
            start_s = time.perf_counter()
            result = work(item)
            self._note(stage, time.perf_counter() - start_s)
            return result

        return timed_work

    def timed_each(self, stage: str, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yield the frames, timing how long each took to come."""
        iterator = iter(frames)
        while True:
            start_s = time.perf_counter()
            frame = next(iterator, None)
            if frame is None:  # finding out that there is no more is not decoding a frame
                return
            self._note(stage, time.perf_counter() - start_s)
            yield frame

    def note_shown(self, frame: Frame, *, frames_in: int, frames_out: int) -> None:
        """Note that a frame has been shown, and renew the figures every half second, so that they can be read."""
        now_s = time.perf_counter()
        self._shown_s.append(now_s)
        self._renewed_s = self._renewed_s or now_s
        if frame.arrived_s:
            self._note("age", now_s - frame.arrived_s)
        if now_s - self._renewed_s > 0.5:
            with self._lock:
                infer_ms = 1000 * np.array(self._infer_s)
            self._renewed_s = now_s
            self._figures = Figures(
                self._figures.backend,
                (len(self._shown_s) - 1) / (now_s - self._shown_s[0]),
                float(np.median(infer_ms)),
                float(np.percentile(infer_ms, 99)),
                frames_in - frames_out if frame.arrived_s else 0,
                1000 * (now_s - frame.arrived_s) if frame.arrived_s else None,
            )

    def figures(self) -> Figures:
        return self._figures

    def count(self, stage: str) -> int:
        """Return how many frames a stage has worked on."""
        return self._counts[stage]

    def kept_ms(self, stage: str) -> npt.NDArray[np.float64]:
        """Return the times that are kept: of all frames, or of the last 20,000; in milliseconds."""
        return np.array(self._kept_s[stage], dtype=np.float64) * 1000

    def _note(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._kept_s[stage].append(seconds)
            self._counts[stage] += 1
            if stage == "infer":
                self._infer_s.append(seconds)
