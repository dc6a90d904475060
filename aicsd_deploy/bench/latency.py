"""How long an artefact takes per frame, host to host, measured side by side with others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aicsd_deploy.console import progress
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import resize_image


@dataclass(frozen=True)
class Latency:
    """Milliseconds from a frame in host memory to its labels in host memory, one frame at a time; no outlier is dropped.

    Attributes:
        p50_ms, p90_ms, p99_ms, mean_ms: of all timed frames.
        fps: timed frames by the time they took.
        frames: how many frames were timed.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    fps: float
    frames: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Latency:
        """Sum up single times, in milliseconds."""
        p50, p90, p99 = (float(v) for v in np.percentile(times_ms, [50, 90, 99]))
        mean = float(np.mean(times_ms))
        return cls(p50, p90, p99, mean, 1000 / mean, len(times_ms))


def measure_latency(
    backends: Sequence[Backend],
    frames_bgr: Sequence[UInt8Array],
    *,
    rounds: int = 20,
    per_round: int = 5,
    warmup: int = 10,
) -> list[Latency]:
    """Time several backends in turns, so that drift of the machine's speed hits all of them alike.

    Args:
        backends: what to time; each gets the frames at its own size and channel order, resized before the clock starts.
        frames_bgr: real frames, uint8 (H, W, 3).
        rounds: how often every backend has its turn.
        per_round: timed frames in a turn; one more before them, not timed, brings the backend's data back into the caches.
        warmup: frames that each backend sees before the first round.
    """
    prepared = [_prepare(backend, frames_bgr) for backend in backends]
    times_ms: list[list[float]] = [[] for _ in backends]
    for backend, frames in zip(backends, prepared, strict=True):
        for i in range(warmup):
            backend.infer(frames[i % len(frames)])
    with progress("timing", rounds) as advance:
        for turn in range(rounds):
            for backend, frames, times in zip(backends, prepared, times_ms, strict=True):
                backend.infer(frames[turn % len(frames)])
                for i in range(per_round):
                    frame = frames[(turn * per_round + i) % len(frames)]
                    start = time.perf_counter()
                    backend.infer(frame)
                    times.append(1000 * (time.perf_counter() - start))
            advance()
    return [Latency.of(times) for times in times_ms]


def _prepare(backend: Backend, frames_bgr: Sequence[UInt8Array]) -> list[UInt8Array]:
    frames = [resize_image(frame, backend.metadata.image_size_hw) for frame in frames_bgr]
    if backend.metadata.channel_order == "rgb":
        frames = [frame[..., ::-1] for frame in frames]
    return [np.ascontiguousarray(frame)[None] for frame in frames]
