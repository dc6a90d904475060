"""Frames per second by batch size, each artefact on its own, and on an NVIDIA GPU the power it draws meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aicsd_deploy.bench.gpu_meter import GpuMeter, GpuUse
from aicsd_deploy.errors import InputError
from aicsd_deploy.runtime.base import Backend, UInt8Array

BATCHES = (1, 2, 4, 8, 16, 32)
SECONDS = 0.5
WORTH_GROWING = 1.02
"""A larger batch is tried only while the last one gave at least 2 % more frames per second."""


@dataclass(frozen=True)
class Throughput:
    """How many frames per second an artefact labels when it does nothing else.

    Attributes:
        fps_by_batch: frames per second by batch size, from 1 up to the first that brought nothing, or the last that ran.
        best_batch: the batch size with the most frames per second.
        best_fps: its frames per second.
        gpu: power, energy, clocks and temperature at that batch size; None where there is no GPU to ask.
    """

    fps_by_batch: dict[int, float]
    best_batch: int
    best_fps: float
    gpu: GpuUse | None


def measure_throughput(backend: Backend, frames_NHWC: Sequence[UInt8Array]) -> Throughput:
    """Measure one artefact; it takes batches of 1 only unless "batch" is in its `metadata.dynamic`.

    Args:
        backend: what to measure.
        frames_NHWC: prepared frames, uint8 (1, H, W, 3) each.
    """
    meter = GpuMeter.of(backend.device)
    fps: dict[int, float] = {}
    use: dict[int, GpuUse | None] = {}
    for size in BATCHES if "batch" in backend.metadata.dynamic else BATCHES[:1]:
        batch = np.concatenate([frames_NHWC[i % len(frames_NHWC)] for i in range(size)])
        try:
            backend.infer(batch)
        except InputError:  # no memory left for so many frames, say; fewer were measured
            if size == 1:
                raise
            break
        before = meter.read() if meter else None
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < SECONDS:
            backend.infer(batch)
            calls += 1
        elapsed = time.perf_counter() - start
        use[size] = meter.use_since(before, frames=calls * size, seconds=elapsed) if meter and before else None
        fps[size] = calls * size / elapsed
        if size > 1 and fps[size] < WORTH_GROWING * fps[size // 2]:
            break
    best = max(fps, key=lambda size: fps[size])
    return Throughput(fps, best, fps[best], use[best])
