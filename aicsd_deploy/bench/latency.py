"""How long an artefact takes per frame, host to host, measured side by side with others."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aicsd_deploy.console import progress
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import as_input

STABLE = 0.05
"""Warm-up ends when two windows of frames have medians that differ by less than this part."""
WARMUP_WINDOW, WARMUP_MAX = 5, 60
NOISY_INTERVAL, NOISY_JITTER = 0.05, 0.25
CONFIDENCE_PERCENT = 95
NORMAL = 1.960
STUDENT_T = {1: NORMAL, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantiles of the normal distribution and of Student's t, by the number of blocks; one block shows no scatter."""
BLOCKS = 5


@dataclass(frozen=True)
class Latency:
    """Milliseconds from a frame in host memory to its labels in host memory, one frame at a time; no outlier is dropped.

    Attributes:
        p50_ms, p90_ms, p95_ms, p99_ms, mean_ms: of all timed frames.
        p50_interval_ms: where a repeat of the run would put the median, in 95 % of the cases (see `median_interval`).
        jitter_ms: standard deviation.
        fps: timed frames by the time they took.
        frames: how many frames were timed.
        warmup_frames: how many went before.
        noise: what makes the figures less than certain, in words; empty where nothing was seen.
        times_ms: every single time, in order.
        per_round: how many of them make a round.
    """

    p50_ms: float
    p50_interval_ms: tuple[float, float]
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    jitter_ms: float
    fps: float
    frames: int
    warmup_frames: int
    noise: tuple[str, ...]
    times_ms: tuple[float, ...]
    per_round: int

    @classmethod
    def of(cls, rounds_ms: Sequence[Sequence[float]], *, warmup_frames: int = 0, stable: bool = True) -> Latency:
        """Sum up single times in milliseconds, grouped by round."""
        times = np.asarray([time for times in rounds_ms for time in times])
        p50, p90, p95, p99 = (float(v) for v in np.percentile(times, [50, 90, 95, 99]))
        low, high = median_interval(rounds_ms)
        mean, jitter = float(times.mean()), float(times.std())
        noise = [] if len(rounds_ms) > 1 else ["one round of timing has no interval"]
        if not stable:
            noise.append(f"still changing by more than {100 * STABLE:.0f} % after {warmup_frames} warm-up frames")
        if (high - low) / 2 > NOISY_INTERVAL * p50:
            noise.append(f"the median is uncertain by {50 * (high - low) / p50:.0f} %")
        if jitter > NOISY_JITTER * mean:
            noise.append(f"frames scatter by {100 * jitter / mean:.0f} % of their mean")
        rounded = tuple(round(float(v), 4) for v in times)
        return cls(
            p50, (low, high), p90, p95, p99, mean, jitter, 1000 / mean, len(times), warmup_frames, tuple(noise), rounded,
            len(rounds_ms[0]),
        )  # fmt: skip

    @property
    def rounds_ms(self) -> list[tuple[float, ...]]:
        return [self.times_ms[i : i + self.per_round] for i in range(0, len(self.times_ms), self.per_round)]


def median_interval(rounds_ms: Sequence[Sequence[float]], *, resamples: int = 2000) -> tuple[float, float]:
    """Return the interval that holds the median of a repeat of the run in 95 % of the cases.

    That is what two reports are held against each other for: a repeat errs as much as the run itself, so that the
    interval is wider, by the square root of 2, than one that need only hold the true median.
    """
    return _interval(float(np.median(np.asarray(rounds_ms))), _resampled_medians(rounds_ms, resamples), len(rounds_ms))


def ratio_interval(
    rounds_ms: Sequence[Sequence[float]], reference_ms: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Return the same interval for the ratio of two medians, of backends that took turns in the same rounds.

    What changes the machine's speed from round to round changes both, and their ratio hardly.
    """
    ratio = float(np.median(np.asarray(rounds_ms)) / np.median(np.asarray(reference_ms)))
    return _interval(ratio, _resampled_medians(rounds_ms) / _resampled_medians(reference_ms), len(rounds_ms))


def _resampled_medians(rounds_ms: Sequence[Sequence[float]], resamples: int = 2000) -> npt.NDArray[np.float64]:
    """Return medians of the rounds drawn anew, by the same draws for every backend with as many rounds.

    Neighbouring frames share the machine's mood, so that single times are not independent: whole blocks of consecutive
    rounds, a fifth of the run each, are drawn with replacement (circular block bootstrap, Politis and Romano 1992).
    """
    rounds = np.asarray(rounds_ms)
    count = len(rounds)
    block = max(1, count // BLOCKS)
    starts = np.random.default_rng(0).integers(0, count, (resamples, -(-count // block)))
    drawn = ((starts[:, :, None] + np.arange(block)) % count).reshape(resamples, -1)[:, :count]
    medians: npt.NDArray[np.float64] = np.median(rounds[drawn].reshape(resamples, -1), axis=1)
    return medians


def _interval(median: float, resampled: npt.NDArray[np.float64], rounds: int) -> tuple[float, float]:
    """Return the interval around a median, from medians of resampled rounds.

    What so few blocks show of the scatter is too little: it is stretched as Student's t stretches the normal
    distribution. Of the 200 pairs of runs of 20 independent rounds that tests/bench/test_latency.py simulates, the first one's
    interval holds the second one's median in 192; with fewer than 8 rounds, or rounds that drift, it does so less often.
    Downwards it is stretched in proportion: two or three rounds that differ much would else take it below 0, where no time is.
    """
    tail = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    stretch = math.sqrt(2) * STUDENT_T[min(rounds, BLOCKS)] / NORMAL
    return median * (float(low) / median) ** stretch, median + stretch * (float(high) - median)


class Stopwatch:
    """Times several backends in turns, round by round, so that drift of the machine's speed hits all of them alike.

    Args:
        backends: what to time; each gets the frames at its own size and channel order, resized before the clock starts, and
            is warmed up at once.
        frames_bgr: real frames, uint8 (H, W, 3).
        per_round: timed frames in a turn; one more before them, not timed, brings the backend's data back into the caches.
    """

    def __init__(self, backends: Sequence[Backend], frames_bgr: Sequence[UInt8Array], *, per_round: int = 5) -> None:
        self._backends, self._per_round = backends, per_round
        self._prepared = [prepare_frames(backend, frames_bgr) for backend in backends]
        self._warm = [_warm_up(backend, frames) for backend, frames in zip(backends, self._prepared, strict=True)]
        self._times_ms: list[list[list[float]]] = [[] for _ in backends]

    def run_round(self) -> None:
        """Give every backend its turn; each round starts with another one."""
        done = len(self._times_ms[0])
        for place in range(len(self._backends)):
            which = (done + place) % len(self._backends)
            backend, frames = self._backends[which], self._prepared[which]
            backend.infer(frames[done % len(frames)])
            start = done * self._per_round
            turn = [infer_ms(backend, frames[i % len(frames)]) for i in range(start, start + self._per_round)]
            self._times_ms[which].append(turn)

    def latencies(self) -> list[Latency]:
        """Return what was measured, in the order of the backends."""
        return [
            Latency.of(times, warmup_frames=count, stable=stable)
            for times, (count, stable) in zip(self._times_ms, self._warm, strict=True)
        ]


def measure_latency(
    backends: Sequence[Backend], frames_bgr: Sequence[UInt8Array], *, rounds: int, per_round: int = 5
) -> list[Latency]:
    """Time several backends in so many rounds, one after the other (see `Stopwatch`)."""
    stopwatch = Stopwatch(backends, frames_bgr, per_round=per_round)
    with progress("timing", rounds) as advance:
        for _ in range(rounds):
            stopwatch.run_round()
            advance()
    return stopwatch.latencies()


def prepare_frames(backend: Backend, frames_bgr: Sequence[UInt8Array]) -> list[UInt8Array]:
    """Return the frames as a backend takes them: its size, its channel order, one to a batch."""
    return [as_input(frame, backend.metadata) for frame in frames_bgr]


def _warm_up(backend: Backend, frames: Sequence[UInt8Array]) -> tuple[int, bool]:
    """Run until the time per frame is stable; return how many frames that took, and whether it became stable."""
    before = 0.0
    for start in range(0, WARMUP_MAX, WARMUP_WINDOW):
        window = [infer_ms(backend, frames[i % len(frames)]) for i in range(start, start + WARMUP_WINDOW)]
        median = float(np.median(window))
        if before and abs(median - before) < STABLE * before:
            return start + WARMUP_WINDOW, True
        before = median
    return WARMUP_MAX, False


def infer_ms(backend: Backend, frames_NHWC: UInt8Array) -> float:
    """Return the milliseconds that a backend takes from frames in host memory to labels in host memory."""
    start = time.perf_counter()
    backend.infer(frames_NHWC)
    return 1000 * (time.perf_counter() - start)
