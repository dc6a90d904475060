"""What an artefact takes besides time: memory, start-up, weights, arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from aicsd_deploy.memory import peak_resident_bytes
from aicsd_deploy.runtime.base import open_backend


@dataclass(frozen=True)
class Footprint:
    """What a fresh process takes that loads one artefact and labels two frames; None where it could not be measured.

    Attributes:
        memory_mb: most memory it held (resident set), runtime libraries included.
        start_s: from the start of loading to the first labels; imports of the runtime included.
    """

    memory_mb: float | None = None
    start_s: float | None = None


@dataclass(frozen=True)
class Work:
    """What one frame costs in principle; None where the artefact does not tell.

    Attributes:
        parameters: numbers in the weights and biases.
        gflops: billions of floating-point (or integer) operations of convolutions and matrix products, a multiplication and
            an addition counted as two.
        traffic_mb: bytes that these layers read and write, were nothing kept in a cache.
    """

    parameters: int | None = None
    gflops: float | None = None
    traffic_mb: float | None = None


def measure_footprint(path: Path, *, device: str, threads: int | None, memory: str) -> Footprint:
    """Load an artefact in a process of its own and see what it takes."""
    command = [sys.executable, "-m", __spec__.name, str(path), device, str(threads or 0), memory]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return Footprint(**json.loads(answer.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return Footprint()


def count_work(path: Path) -> Work:
    """Count the weights and the arithmetic of a .pt or .onnx file; an engine (.plan) does not tell."""
    try:
        if path.suffix == ".onnx":
            from aicsd_deploy.bench.onnx_work import onnx_work

            return onnx_work(path)
        if path.suffix == ".pt":
            from aicsd_deploy.bench.torch_work import torch_work

            return torch_work(path)
    except ModuleNotFoundError:  # a device that runs artefacts need not have what reads them
        pass
    return Work()


def _take_up(path: Path, device: str, threads: int | None, memory: str) -> Footprint:
    start = time.perf_counter()
    with open_backend(path, device=device, threads=threads, memory=memory) as backend:
        height, width = backend.metadata.image_size_hw
        frame = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        backend.infer(frame)
        start_s = time.perf_counter() - start
        backend.infer(frame)
    peak_bytes = peak_resident_bytes()
    return Footprint(None if peak_bytes is None else peak_bytes / 1e6, start_s)


if __name__ == "__main__":
    print(json.dumps(asdict(_take_up(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) or None, sys.argv[4]))))
