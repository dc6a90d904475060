"""MLPerf's load generator around an artefact: SingleStream and Offline, performance mode.

Source: MLPerf inference rules and loadgen, package mlcommons-loadgen. The system under test is `Backend.infer`, host to host;
samples are the benchmark's frames, loaded beforehand. Runs are as long as asked for, shorter than MLPerf's own 600 s, so the
numbers compare in kind, not as submissions.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aicsd_deploy.errors import MissingDependencyError
from aicsd_deploy.runtime.base import Backend, UInt8Array

MIN_QUERIES = 64
"""Fewer are not enough for loadgen's early stopping to vouch for a 90th percentile."""


def require_loadgen() -> Any:
    """Return the module, or raise MissingDependencyError with the way to get it."""
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise MissingDependencyError(
            f"--loadgen needs MLPerf's load generator ({error}). Install it with: pip install 'aicsd-deploy[loadgen]'"
        ) from error
    return mlperf_loadgen


def run_loadgen(backend: Backend, frames_NHWC: Sequence[UInt8Array], *, seconds: float, batch: int) -> dict[str, Any]:
    """Run both scenarios.

    Args:
        backend: what to measure.
        frames_NHWC: prepared frames, uint8 (1, H, W, 3) each.
        seconds: shortest duration of a scenario.
        batch: how many samples the Offline scenario hands over at a time.

    Returns:
        "single_stream_p90_ms", "offline_fps", "single_stream_valid" and "offline_valid" by loadgen's own rules, and "seconds".
    """
    single, single_valid = _scenario(backend, frames_NHWC, "SingleStream", seconds=seconds, batch=1)
    offline, offline_valid = _scenario(backend, frames_NHWC, "Offline", seconds=seconds, batch=batch)
    estimate_ns = single.get("* Early stopping 90.0th percentile estimate")
    return {
        "single_stream_ms": None if estimate_ns is None else float(estimate_ns) / 1e6,
        "single_stream_p90_ms": float(single["90.0th percentile latency (ns)"]) / 1e6,
        "single_stream_valid": single_valid,
        "offline_fps": float(offline["Samples per second"]),
        "offline_valid": offline_valid,
        "seconds": seconds,
    }


def _scenario(
    backend: Backend, frames: Sequence[UInt8Array], name: str, *, seconds: float, batch: int
) -> tuple[dict[str, str], bool]:
    lg = require_loadgen()

    def issue(samples: list[Any]) -> None:
        for start in range(0, len(samples), batch):
            group = samples[start : start + batch]
            backend.infer(np.concatenate([frames[sample.index] for sample in group]))
            # The labels are judged elsewhere; in performance mode loadgen only wants to know that they are there.
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in group])

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, name)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1000 * seconds)
    settings.min_query_count = MIN_QUERIES if name == "SingleStream" else 1
    settings.offline_expected_qps = _frames_per_second(backend, frames, batch)
    with tempfile.TemporaryDirectory(prefix="aicsd.loadgen.") as folder:
        log = lg.LogSettings()
        log.log_output.outdir = folder
        log.log_output.copy_summary_to_stdout = False
        log.enable_trace = False
        library = lg.ConstructQSL(len(frames), len(frames), lambda indices: None, lambda indices: None)
        system = lg.ConstructSUT(issue, lambda: None)
        try:
            lg.StartTestWithLogSettings(system, library, settings, log)
        finally:
            lg.DestroySUT(system)
            lg.DestroyQSL(library)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    pairs = (line.split(":", 1) for line in summary.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in pairs}
    return found, found.get("Result is") == "VALID"


def _frames_per_second(backend: Backend, frames: Sequence[UInt8Array], batch: int) -> float:
    """Return a first guess, from which loadgen works out how many samples the Offline scenario needs."""
    group = np.concatenate([frames[i % len(frames)] for i in range(batch)])
    backend.infer(group)
    start = time.perf_counter()
    for _ in range(3):
        backend.infer(group)
    return 3 * batch / (time.perf_counter() - start)
