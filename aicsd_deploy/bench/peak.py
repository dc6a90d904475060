"""What the machine can do at most, measured: float32 arithmetic and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SECONDS = 0.5


@dataclass(frozen=True)
class Peak:
    """The best of several tries, on all cores.

    Attributes:
        gflops: billions of operations per second of a float32 matrix product (on a GPU with TF32, as networks run there).
        bandwidth_gbs: billions of bytes per second of a copy of 64 MB (on a GPU 1 GB), read and written bytes both counted.
    """

    gflops: float
    bandwidth_gbs: float


def measure_peak(device: str) -> Peak | None:
    """Measure a device that artefacts run on, "cpu" or "cuda:N"; None for a GPU that PyTorch is not there for or cannot use."""
    if not device.startswith("cuda"):
        return _cpu_peak()
    try:
        return _gpu_peak(device)
    except (ImportError, AssertionError, RuntimeError):  # none installed, one for the CPU only, or no memory left
        return None


def _cpu_peak() -> Peak:
    size, length = 1536, 16_000_000
    rng = np.random.default_rng(0)
    a, b = (rng.random((size, size), dtype=np.float32) for _ in range(2))
    out = np.empty_like(a)
    source, target = np.ones(length, np.float32), np.zeros(length, np.float32)
    product_s = _best(lambda: np.matmul(a, b, out=out))
    return Peak(2 * size**3 / product_s / 1e9, 2 * source.nbytes / _best(lambda: np.copyto(target, source)) / 1e9)


def _gpu_peak(device: str) -> Peak:
    import torch

    size = 8192
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    source = torch.ones(2**28, device=device)
    target = torch.empty_like(source)

    def timed(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            work()
            torch.cuda.synchronize(device)

        return run

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        product_s = _best(timed(lambda: a @ b))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    copied_bytes = 2 * source.numel() * source.element_size()
    return Peak(2 * size**3 / product_s / 1e9, copied_bytes / _best(timed(lambda: target.copy_(source))) / 1e9)


def _best(work: Callable[[], object]) -> float:
    """Return the shortest time in seconds that `work` took, over half a second of tries after a first one."""
    work()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
