"""Accuracy and latency of artefacts side by side: report.json for programs, report.md for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.bench.latency import measure_latency
from aicsd_deploy.console import percent, say, table
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.export.verify import frames_for_comparison
from aicsd_deploy.files import write_json, write_text
from aicsd_deploy.metadata import provenance
from aicsd_deploy.runtime.base import open_backend

SCHEMA_VERSION = 1
TIMED_FRAMES = 16


def benchmark(
    paths: Sequence[Path], dataset: SegmentationDataset, *, device: str, threads: int | None, rounds: int
) -> dict[str, Any]:
    """Score and time artefacts and return the content of report.json.

    Raises:
        InputError: an artefact cannot be loaded, or has other classes than the data.
    """
    backends = [open_backend(path, device=device, threads=threads) for path in paths]
    try:
        rows = []
        for path, backend in zip(paths, backends, strict=True):
            say(f"{path}: {backend.name} on {backend.device}")
            scores = evaluate(backend, dataset, title=f"scoring {path.name}").scores(backend.metadata.class_names)
            rows.append({"path": str(path), **scores.to_dict()})
        frames = frames_for_comparison(dataset, count=TIMED_FRAMES)
        latencies = measure_latency(backends, frames, rounds=rounds)
        for row, path, backend, latency in zip(rows, paths, backends, latencies, strict=True):
            metadata = backend.metadata
            row |= asdict(latency) | {
                "runtime": backend.name,
                "device": backend.device,
                "precision": metadata.precision,
                "image_size_hw": list(metadata.image_size_hw),
                "model": metadata.model,
                "role": metadata.role,
                "method": metadata.method,
                "file_mb": path.stat().st_size / 1e6,
            }
    finally:
        for backend in backends:
            backend.close()
    return {
        "schema_version": SCHEMA_VERSION,
        "data": dataset.spec,
        "split": dataset.split,
        "threads": threads,
        "artifacts": rows,
        "environment": environment(),
        "provenance": provenance(),
    }


def summary_table(report: dict[str, Any]) -> str:
    """Return accuracy and latency of every artefact as a Markdown table."""
    headers = [
        "artefact",
        "network",
        "method",
        "runtime",
        "mIoU, %",
        "p50, ms",
        "p90, ms",
        "p99, ms",
        "fps",
        "file, MB",
    ]
    rows = [
        [
            row["path"],
            f"{row['role']} {row['model']}",
            row["method"],
            f"{row['runtime']} {row['precision']}",
            percent(row["miou"]),
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
            f"{row['fps']:.1f}",
            f"{row['file_mb']:.1f}",
        ]
        for row in report["artifacts"]
    ]
    return table(headers, rows)


def to_markdown(report: dict[str, Any]) -> str:
    """Return report.md: the summary, the classes, how it was measured and on what."""
    artifacts, machine = report["artifacts"], report["environment"]
    sizes = ", ".join(sorted({"x".join(map(str, row["image_size_hw"])) for row in artifacts}))
    classes = [
        [name, *(percent(row["per_class_iou"][name]) for row in artifacts)] for name in artifacts[0]["per_class_iou"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return f"""# Accuracy and latency

{summary_table(report)}

mIoU on {report["data"]} ({report["split"]}, {artifacts[0]["images"]} images), at the size of the labels. Latency is host to
host, uint8 frame in and uint8 labels out (normalisation, upsampling and argmax included), one frame at a time at {sizes} (HxW):
{artifacts[0]["frames"]} real frames per artefact, timed in turns after a warm-up, no outlier dropped.

## IoU of each class, %

{table(["class", *(f"{Path(row['path']).parent.name}/{Path(row['path']).name}" for row in artifacts)], classes)}

## Measured on

- CPU: {machine["cpu"]}, {machine["cpu_cores"]} cores, {machine["memory_gib"]} GiB; threads: {report["threads"] or "as the runtimes choose"}
- GPU: {"; ".join(machine["gpu"]) or "none"}
- {machine["system"]}, Python {machine["python"]}, {versions}
- aicsd-deploy {report["provenance"]["aicsd_deploy"]}, git {machine["git"] or "unknown"}, {report["provenance"]["created"]}
- `{report["provenance"]["command"]}`
"""


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write report.json and report.md into a folder."""
    paths = [folder / "report.json", folder / "report.md"]
    write_json(paths[0], report)
    write_text(paths[1], to_markdown(report))
    return paths
