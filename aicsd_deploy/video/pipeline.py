"""Decode, infer, render and encode at the same time: one thread per stage, short queues between them."""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from aicsd_deploy.console import progress
from aicsd_deploy.errors import InputError
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import segment
from aicsd_deploy.video.lanes import Lane, Stop
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.sources import Frame, Source

STAGES = ("decode", "infer", "render", "encode")
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_RECENT = 60  # frames that the numbers on the screen are taken over


@dataclass(frozen=True)
class VideoResult:
    """What came of a run.

    Attributes:
        frames_in: frames that the source gave.
        frames_out: frames that the sink took.
        skipped: frames of the source that could not be decoded.
        seconds: wall time from the first frame's decoding to the sink's end.
        times_ms: for each stage, how long it worked on each frame.
        interrupted: Ctrl-C, a termination signal or the viewer ended it early.
    """

    frames_in: int
    frames_out: int
    skipped: int
    seconds: float
    times_ms: dict[str, npt.NDArray[np.float64]]
    interrupted: bool

    @property
    def dropped(self) -> int:
        """Frames that were read and not shown: too old by then (live sources), or under way when it was stopped."""
        return self.frames_in - self.frames_out

    @property
    def fps(self) -> float:
        return self.frames_out / self.seconds

    def latency_ms(self) -> dict[str, float]:
        """Return mean, p50, p90 and p99 of inference, resizing to the network and back included; each stage's mean."""
        if not self.frames_out:
            return {}
        infer = self.times_ms["infer"]
        quantiles = {f"p{q}": float(np.percentile(infer, q)) for q in (50, 90, 99)}
        return {"mean": float(infer.mean()), **quantiles, **{s: float(self.times_ms[s].mean()) for s in STAGES}}

    def summary(self) -> dict[str, Any]:
        """Return the numbers as a report has them."""
        return {
            "frames_in": self.frames_in,
            "frames_out": self.frames_out,
            "dropped": self.dropped,
            "skipped": self.skipped,
            "fps": self.fps,
            "latency_ms": self.latency_ms(),
            "interrupted": self.interrupted,
        }


def process_video(
    source: Source, backend: Backend, sink: Sink, *, overlay: Overlay, max_frames: int | None = None, depth: int = 4
) -> VideoResult:
    """Segment every frame of a file, or the newest one of a live source each time, and hand it to the sink in order.

    The sink runs in the calling thread (a window needs the main thread), the other stages in threads of their own.
    Ctrl-C and SIGTERM end the run early, and the sink finishes what it has; a second one ends the process.

    Args:
        source, backend, sink: an open source and backend, and a sink that is not open yet.
        overlay: draws on each frame.
        max_frames: stop after so many frames.
        depth: frames that may wait between two stages of a file; between those of a live source it is one.

    Raises:
        InputError: the source gave no frame at all.
        Exception: whatever a stage raised; the other stages have ended by then.
    """
    segment(backend, np.zeros((*source.size_hw, 3), np.uint8))  # warms up, and fails before there is an output
    clock = _Clock()
    seconds = -time.perf_counter()
    with Stop() as stop, sink.open(source):  # the sink finishes while a second Ctrl-C still ends the process
        to_infer, to_render, to_encode = (Lane(stop, 1 if source.live else depth, newest=source.live) for _ in range(3))

        def infer(frame: Frame) -> tuple[Frame, UInt8Array]:
            return frame, segment(backend, frame.image_bgr)

        def render(pair: tuple[Frame, UInt8Array]) -> Frame:
            overlay.draw(pair[0].image_bgr, pair[1], hud=clock.hud(backend.name))
            return pair[0]

        decoded = clock.timed_each("decode", islice(source, max_frames))
        threads = [
            _stage_thread(stop, "decode", decoded, lambda frame: frame, to_infer),
            _stage_thread(stop, "infer", to_infer, clock.timed("infer", infer), to_render),
            _stage_thread(stop, "render", to_render, clock.timed("render", render), to_encode),
        ]
        try:
            for thread in threads:
                thread.start()
            frames_out = _drain(to_encode, clock.timed("encode", sink.write), stop, _expected(source, max_frames))
        finally:
            stop.event.set()
            for thread in threads:
                if thread.ident is not None:  # it has been started
                    thread.join()
        if stop.error is not None:
            raise stop.error
        if not frames_out and not stop.interrupted:
            raise InputError(f"{source.name} gave no frame.")
    seconds += time.perf_counter()
    times_ms = {stage: np.array(values) * 1000 for stage, values in clock.times_s.items()}
    return VideoResult(len(clock.times_s["decode"]), frames_out, source.skipped, seconds, times_ms, stop.interrupted)


def _stage_thread(
    stop: Stop, name: str, items: Iterable[Any], work: Callable[[Any], Any], out: Lane
) -> threading.Thread:
    """Return the thread that works on each item and passes it on, until there are no more or all must stop."""

    def loop() -> None:
        try:
            for item in items:
                if not out.put(work(item)):
                    return
            out.put_end()
        except BaseException as error:  # handed to the caller's thread, whatever it is
            stop.fail(error)

    return threading.Thread(target=loop, name=name, daemon=True)


def _drain(lane: Lane, write: Callable[[Frame], bool], stop: Stop, expected: int | None) -> int:
    written = 0
    with progress("Segmenting", expected) as advance:
        for frame in lane:
            wants_more = write(frame)
            written += 1
            advance()
            if not wants_more:
                stop.interrupt()
    return written


def _expected(source: Source, max_frames: int | None) -> int | None:
    return min((n for n in (source.frame_count, max_frames) if n is not None), default=None)


class _Clock:
    """How long each stage takes for each frame, and the line about it that is drawn on the frames."""

    def __init__(self) -> None:
        self.times_s = {stage: array("d") for stage in STAGES}
        self._shown_s: deque[float] = deque(maxlen=_RECENT)
        self._hud, self._hud_s = "", 0.0

    def timed(self, stage: str, work: Callable[[_In], _Out]) -> Callable[[_In], _Out]:
        def timed_work(item: _In) -> _Out:
            start_s = time.perf_counter()
            result = work(item)
            self.times_s[stage].append(time.perf_counter() - start_s)
            return result

        return timed_work

    def timed_each(self, stage: str, frames: Iterable[Frame]) -> Iterator[Frame]:
        iterator = iter(frames)
        following = self.timed(stage, lambda _: next(iterator, None))
        while (frame := following(None)) is not None:
            yield frame
        self.times_s[stage].pop()  # finding out that there is no more is not decoding a frame

    def hud(self, backend_name: str) -> str:
        """Return the numbers over the last frames, renewed twice a second so that they can be read."""
        now_s = time.perf_counter()
        self._shown_s.append(now_s)
        if now_s - self._hud_s > 0.5 and len(self._shown_s) > 1:
            fps = (len(self._shown_s) - 1) / (now_s - self._shown_s[0])
            p50_ms = 1000 * float(np.median(self.times_s["infer"][-_RECENT:]))
            self._hud, self._hud_s = f"{fps:.1f} fps   {p50_ms:.1f} ms p50   {backend_name}", now_s
        return self._hud or backend_name
