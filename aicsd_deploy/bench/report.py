"""Accuracy, latency and cost of artefacts side by side, as the content of report.json."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aicsd_deploy.bench.accuracy import Accuracy, score_together
from aicsd_deploy.bench.environment import environment
from aicsd_deploy.bench.footprint import count_work, measure_footprint
from aicsd_deploy.bench.latency import Latency, Stopwatch, prepare_frames, ratio_interval
from aicsd_deploy.bench.loadgen import require_loadgen, run_loadgen
from aicsd_deploy.bench.machine_load import watch_machine
from aicsd_deploy.bench.peak import Peak, measure_peak
from aicsd_deploy.bench.pictures import Picture, draw_frames
from aicsd_deploy.bench.report_html import require_jinja
from aicsd_deploy.bench.throughput import measure_throughput
from aicsd_deploy.console import progress, say
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.errors import MissingDependencyError
from aicsd_deploy.evaluate import check_same_classes
from aicsd_deploy.export.verify import frames_for_comparison
from aicsd_deploy.metadata import provenance
from aicsd_deploy.runtime.base import Backend, UInt8Array, open_backend

SCHEMA_VERSION = 3
TIMED_FRAMES, STAGE_FRAMES = 16, 11


def benchmark(
    paths: Sequence[Path],
    dataset: SegmentationDataset,
    *,
    reference: int = 0,
    device: str,
    threads: int | None,
    memory: str = "auto",
    rounds: int,
    loadgen_s: float | None = None,
    pictures: bool = True,
) -> tuple[dict[str, Any], list[Picture]]:
    """Score and time artefacts.

    Args:
        paths: the artefacts.
        dataset: labelled images to score on; the timed frames are among them.
        reference: which of the artefacts the others are held against.
        device: as for `open_backend`.
        threads: CPU threads for every network; None leaves it to the runtimes.
        memory: as for `open_backend`.
        rounds: rounds of timing, 5 frames each.
        loadgen_s: seconds for each scenario of MLPerf's load generator; None leaves it out.
        pictures: draw the worst and a typical frame of each artefact.

    Returns:
        the content of report.json, and the pictures, in the order of the artefacts.

    Raises:
        InputError: an artefact cannot be loaded, or has other classes than the data.
        MissingDependencyError: what draws the page, or the load generator that is asked for, is not installed.
    """
    if loadgen_s is not None:
        require_loadgen()
    require_jinja()  # minutes before the page is written
    with ExitStack() as stack:
        how: dict[str, Any] = {"device": device, "threads": threads, "memory": memory}
        backends = [stack.enter_context(_opened(path, **how)) for path in paths]
        for path, backend in zip(paths, backends, strict=True):
            say(f"{path}: {backend.name} on {backend.device}")
            check_same_classes(backend.metadata.classes, dataset.classes, spec=dataset.spec, artifact=str(path))
        frames = frames_for_comparison(dataset, count=TIMED_FRAMES)
        with watch_machine() as load:
            stopwatch = Stopwatch(backends, frames)

            def time_some(index: int) -> None:
                for _ in range((index + 1) * rounds // len(dataset) - index * rounds // len(dataset)):
                    stopwatch.run_round()

            # Rounds of timing are spread over the scoring, so that they see how the machine's speed drifts meanwhile
            accuracies = score_together(backends, dataset, reference=reference, after_image=time_some)
            latencies = stopwatch.latencies()
        peaks = {device: measure_peak(device) for device in dict.fromkeys(backend.device for backend in backends)}
        rows = []
        with progress("stages, batches, memory", len(paths)) as advance:
            for path, backend, accuracy, latency in zip(paths, backends, accuracies, latencies, strict=True):
                rows.append(
                    {
                        "path": str(path),
                        **_accuracy_of(accuracy, dataset),
                        **asdict(latency),
                        "p50_ratio": latency.p50_ms / latencies[reference].p50_ms,
                        "p50_ratio_interval": ratio_interval(latency.rounds_ms, latencies[reference].rounds_ms),
                        **_speed_of(backend, prepare_frames(backend, frames), loadgen_s),
                        **_cost_of(path, latency, peaks[backend.device], how),
                        **_identity_of(backend),
                    }
                )
                advance()
        drawn = draw_frames(backends, dataset, accuracies, reference=reference) if pictures else []
    report = {
        "schema_version": SCHEMA_VERSION,
        "data": dataset.spec,
        "split": dataset.split,
        "reference": reference,
        "class_colors_rgb": {c.name: list(c.color_rgb) for c in dataset.classes},
        "threads": threads,
        "artifacts": rows,
        "peak": {device: peak and asdict(peak) for device, peak in peaks.items()},
        "machine_load": asdict(load),
        "noise": load.noise(),
        "environment": environment(),
        "provenance": provenance(),
    }
    return report, drawn


def _accuracy_of(accuracy: Accuracy, dataset: SegmentationDataset) -> dict[str, Any]:
    return {
        **accuracy.scores.to_dict(),
        "agreement": accuracy.agreement,
        "worst_frame": dataset.name(accuracy.worst_frame),
        "typical_frame": dataset.name(accuracy.typical_frame),
    }


def _speed_of(backend: Backend, prepared: Sequence[UInt8Array], loadgen_s: float | None) -> dict[str, Any]:
    """Measure the stages of a frame and frames in batches, and have MLPerf's load generator do so where it is asked for."""
    throughput = measure_throughput(backend, prepared)
    return {
        "stages_ms": backend.time_stages([prepared[i % len(prepared)] for i in range(STAGE_FRAMES)]),
        "throughput": asdict(throughput) | {"fps_by_batch": {str(k): v for k, v in throughput.fps_by_batch.items()}},
        "loadgen": loadgen_s and run_loadgen(backend, prepared, seconds=loadgen_s, batch=throughput.best_batch),
    }


def _cost_of(path: Path, latency: Latency, peak: Peak | None, how: dict[str, Any]) -> dict[str, Any]:
    """Count the work of a frame, the share of the machine's peak that it reaches, and memory."""
    work, seconds = count_work(path), latency.p50_ms / 1000
    return {
        **asdict(work),
        **asdict(measure_footprint(path, **how)),
        "compute_share": peak and work.gflops and work.gflops / seconds / peak.gflops,
        "bandwidth_share": peak and work.traffic_mb and work.traffic_mb / 1e3 / seconds / peak.bandwidth_gbs,
        "file_mb": path.stat().st_size / 1e6,
    }


def _identity_of(backend: Backend) -> dict[str, Any]:
    metadata = backend.metadata
    return {
        "runtime": backend.name,
        "device": backend.device,
        "precision": metadata.precision,
        "image_size_hw": list(metadata.image_size_hw),
        "model": metadata.model,
        "role": metadata.role,
        "method": metadata.method,
        "artifact_provenance": metadata.provenance,
    }


def _opened(path: Path, **how: Any) -> Backend:
    try:
        return open_backend(path, **how)
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error} Or leave {path} out of this report.") from error
