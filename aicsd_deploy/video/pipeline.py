"""Decode, infer, render and encode at the same time: one thread per stage, short queues between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from aicsd_deploy.console import progress
from aicsd_deploy.errors import InputError
from aicsd_deploy.runtime.base import Backend
from aicsd_deploy.runtime.frames import Fit, Segmenter
from aicsd_deploy.video.figures import STAGES, Stopwatch
from aicsd_deploy.video.lanes import Fan, Lane, Stop
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.smooth import LabelSmoother
from aicsd_deploy.video.sources import Frame, Source

LATE = 1.25
"""A live frame is waited for up to this many frame times after the one before it came."""

READING_ENDS_S = 1.0
"""How long the end waits for the source: a server that is silent holds FFmpeg for twenty seconds, and nothing can wake that."""


@dataclass(frozen=True)
class VideoResult:
    """What came of a run.

    Attributes:
        frames_in: frames that the source gave.
        frames_out: frames that the sink took.
        skipped: frames of the source that could not be decoded.
        seconds: wall time from the first frame's decoding to the sink's end.
        times_ms: for each stage, how long it worked on each of the last frames.
        age_ms: live sources: time from a frame's arrival until it was shown, for each of the last frames; else empty.
        ended: "end" of the source, "lost" (`Source.lost`), "max_frames", or "interrupted" by Ctrl-C,
            a termination signal or the viewer.
        signal: the number of that signal, Ctrl-C's among them; None where none came.
        reconnects: how often a live source was lost and came back.
        resize: how frames reached the network (`Segmenter.describe`).
    """

    frames_in: int
    frames_out: int
    skipped: int
    seconds: float
    times_ms: dict[str, npt.NDArray[np.float64]]
    age_ms: npt.NDArray[np.float64]
    ended: Literal["end", "lost", "max_frames", "interrupted"]
    signal: int | None
    reconnects: int
    resize: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        return self.ended == "interrupted"

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
        return {"mean": float(infer.mean()), **_quantiles(infer), **{s: float(self.times_ms[s].mean()) for s in STAGES}}

    def summary(self) -> dict[str, Any]:
        """Return the numbers as a report has them."""
        return {
            "frames_in": self.frames_in,
            "frames_out": self.frames_out,
            "dropped": self.dropped,
            "skipped": self.skipped,
            "fps": self.fps,
            "latency_ms": self.latency_ms(),
            "age_ms": {**_quantiles(self.age_ms), "max": float(self.age_ms.max())} if self.age_ms.size else None,
            "ended": self.ended,
            "interrupted": self.interrupted,
            "reconnects": self.reconnects,
            "resize": self.resize,
        }


def process_video(
    source: Source,
    backend: Backend | Sequence[Backend],
    sink: Sink,
    *,
    overlay: Overlay,
    fit: Fit = "stretch",
    smooth: int = 1,
    max_frames: int | None = None,
    depth: int = 4,
) -> VideoResult:
    """Segment every frame of a file, or the newest one of a live source each time, and hand it to the sink in order.

    The sink runs in the calling thread (a window needs the main thread), the other stages in threads of their own.
    Ctrl-C, SIGTERM and SIGHUP end the run early, and the sink finishes what it has; a second one ends the process.

    Args:
        source, backend, sink: an open source and backend, and a sink that is not open yet. Several backends of one artefact
            take turns, so that on a GPU the copies of one frame overlap with the network on another; live sources use the
            first alone, since two frames under way would be older than one.
        overlay: draws on each frame, if the sink wants that.
        fit: how frames get to the network's size; see `Segmenter`.
        smooth: frames that a new label must last for before it is shown; see `LabelSmoother`.
        max_frames: stop when so many have been given to the sink; what a live source drops does not count.
        depth: frames that may wait between two stages of a file; between those of a live source it is one.

    Raises:
        InputError: the source gave no frame at all.
        Exception: whatever a stage raised; the other stages have ended by then.
    """
    backends = [backend] if isinstance(backend, Backend) else list(backend)
    segmenters = [Segmenter(b, fit=fit) for b in (backends[:1] if source.live else backends)]
    for segmenter in segmenters:  # warms up, and fails before there is an output
        segmenter(np.zeros((*source.size_hw, 3), np.uint8))
    watch = Stopwatch(f"{backends[0].name} {backends[0].metadata.precision}")
    render = _renderer(sink, overlay, LabelSmoother(smooth), watch)
    start_s = time.perf_counter()
    # Stop lasts until the sink has finished, which a second Ctrl-C does not wait for.
    with Stop(also=source.cancel) as stop, sink.open(source):
        threads, rendered = _stages(stop, source, segmenters, render, watch, depth=depth, max_frames=max_frames)
        with _running(threads, stop, source):
            frames_out = _drain(rendered, sink, watch, stop, source, max_frames)
        if stop.error is not None:
            raise stop.error
        if not frames_out and not stop.interrupted:
            raise InputError(f"{source.name} gave no frame.")
    return VideoResult(
        frames_in=watch.count("decode"),
        frames_out=frames_out,
        skipped=source.skipped,
        seconds=time.perf_counter() - start_s,
        times_ms={stage: watch.kept_ms(stage) for stage in STAGES},
        age_ms=watch.kept_ms("age"),
        ended=_how_it_ended(source, stop, reached_max=frames_out == max_frames),
        signal=stop.signal,
        reconnects=source.reconnects,
        resize=segmenters[0].describe(source.size_hw),
    )


def _renderer(sink: Sink, overlay: Overlay, smoother: LabelSmoother, watch: Stopwatch) -> Callable[[Frame], Frame]:
    """Return what smooths the labels of a frame and draws on it what the sink wants."""

    def render(frame: Frame) -> Frame:
        assert frame.labels is not None
        labels = smoother(frame.labels)
        if not sink.wants_overlay:
            return replace(frame, labels=labels, plain_bgr=frame.image_bgr)
        plain = frame.image_bgr.copy() if sink.wants_plain else None
        overlay.draw(frame.image_bgr, labels, hud=watch.figures().line())
        return replace(frame, labels=labels, plain_bgr=plain)

    return render


def _stages(
    stop: Stop,
    source: Source,
    segmenters: Sequence[Segmenter],
    render: Callable[[Frame], Frame],
    watch: Stopwatch,
    *,
    depth: int,
    max_frames: int | None,
) -> tuple[list[threading.Thread], Lane]:
    """Return the threads of all stages but the last, the one that decodes first, and the lane that rendered frames come from."""

    def lane() -> Lane:
        return Lane(stop, 1 if source.live else depth, newest=source.live)

    to_infer, to_render = ([lane() for _ in segmenters] for _ in range(2))
    rendered = lane()
    # Of a file each frame is shown, so that none need be decoded after the last.
    decoded = watch.timed_each("decode", source if source.live else islice(source, max_frames))
    threads = [_stage_thread(stop, "decode", decoded, lambda frame: frame, Fan(to_infer))]
    for segmenter, before, after in zip(segmenters, to_infer, to_render, strict=True):
        frames: Iterable[Frame] = _fresh(before, source.fps) if source.live else before
        infer = watch.timed("infer", partial(_segmented, segmenter))
        threads.append(_stage_thread(stop, "infer", frames, infer, after))
    threads.append(_stage_thread(stop, "render", Fan(to_render), watch.timed("render", render), rendered))
    return threads, rendered


def _segmented(segmenter: Segmenter, frame: Frame) -> Frame:
    return replace(frame, labels=segmenter(frame.image_bgr))


@contextmanager
def _running(threads: Sequence[threading.Thread], stop: Stop, source: Source) -> Iterator[None]:
    """Run threads beside the block; at its end stop them all and wait for them, for the first, which the source may hold, not long."""
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # it has been started
                thread.join(READING_ENDS_S if thread is threads[0] else None)
        source.left = threads[0].is_alive()


def _how_it_ended(
    source: Source, stop: Stop, *, reached_max: bool
) -> Literal["end", "lost", "max_frames", "interrupted"]:
    if stop.interrupted:
        return "interrupted"
    if reached_max:
        return "max_frames"
    return "lost" if source.lost else "end"


def _stage_thread(
    stop: Stop, name: str, items: Iterable[Any], work: Callable[[Any], Any], out: Lane | Fan
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


def _fresh(lane: Lane, fps: Fraction) -> Iterator[Frame]:
    """Give a live source's frames, none of which has waited for more than half a frame time if the next one is on time.

    A network that is slower than the source finds a frame that has waited for anything up to a frame time. Where the next
    one is due sooner than this one came, waiting for it costs less than its age would. The first has waited until the network
    was loaded.
    """
    frame_time_s = float(1 / fps)
    for frame in lane:
        waited_s = time.perf_counter() - frame.arrived_s
        if frame_time_s / 2 < waited_s < frame_time_s:
            yield lane.newer(frame, within_s=LATE * frame_time_s - waited_s)
        elif frame.index == 0 and waited_s >= frame_time_s:
            yield lane.newer(frame, within_s=LATE * frame_time_s)
        else:
            yield frame


def _drain(lane: Lane, sink: Sink, watch: Stopwatch, stop: Stop, source: Source, max_frames: int | None) -> int:
    expected = min((n for n in (source.frame_count, max_frames) if n is not None), default=None)
    written, start_s, write = 0, 0.0, watch.timed("encode", sink.write)
    with progress("Segmenting", expected) as advance:
        for frame in lane:
            if sink.paced and not source.live:
                start_s = start_s or time.perf_counter() - frame.time_s
                stop.wait(start_s + frame.time_s - time.perf_counter())
            wants_more = write(frame)
            written += 1
            watch.note_shown(frame, frames_in=watch.count("decode"), frames_out=written)
            sink.note(watch.figures())
            advance()
            if not wants_more:
                stop.interrupt()
            if written == max_frames:
                break
    return written


def _quantiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
