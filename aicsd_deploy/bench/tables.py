"""The tables of a report, as text: report.md, report.html, MODEL_CARD.md and the terminal all show these very cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aicsd_deploy.console import percent
from aicsd_deploy.runtime.base import STAGES

Table = tuple[list[str], list[list[str]]]
"""Headers, and rows of cells."""


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the file names, each with as many of its folders as it takes to tell it from the others."""
    parts = [Path(path).parts for path in paths]

    def shortest(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own))
        length = next((n for n in lengths if [other[-n:] for other in parts].count(own[-n:]) == 1), len(own))
        return Path(*own[-length:]).as_posix()

    return [shortest(own) for own in parts]


def names_of(report: dict[str, Any]) -> list[str]:
    """Return the artefacts' short names, in the report's order."""
    return short_names([row["path"] for row in report["artifacts"]])


def summary(report: dict[str, Any]) -> Table:
    """What it can do and how fast it is."""
    headers = ["artefact", "network", "runs in", "mIoU, %", "agrees, %", "p50, ms", "95 % interval", "fps", "file, MB"]
    rows = [
        [
            name,
            f"{row['role']} {row['model']}",
            f"{row['runtime']} {row['precision']}",
            percent(row["miou"]),
            percent(row["agreement"]),
            number(row["p50_ms"]),
            f"{number(row['p50_interval_ms'][0])}–{number(row['p50_interval_ms'][1])}",
            number(row["fps"], 1),
            number(row["file_mb"], 1),
        ]
        for name, row in zip(names_of(report), report["artifacts"], strict=True)
    ]
    return headers, rows


def latency(report: dict[str, Any]) -> Table:
    """How latency is distributed, and frames per second in batches."""
    headers = ["artefact", "p50, ms", "of the reference's (95 %)", "p90", "p95", "p99", "mean", "jitter", "frames", "fps alone", "best fps (batch)"]  # fmt: skip
    rows = []
    for name, row in zip(names_of(report), report["artifacts"], strict=True):
        alone = row["throughput"]
        times = [number(row[key]) for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "jitter_ms")]
        low, high = row["p50_ratio_interval"]
        times.insert(1, f"{row['p50_ratio']:.3f} ({low:.3f}–{high:.3f})")
        best = f"{number(alone['best_fps'], 1)} ({alone['best_batch']})"
        rows.append([name, *times, str(row["frames"]), number(alone["fps_by_batch"]["1"], 1), best])
    return headers, rows


def stages(report: dict[str, Any]) -> Table:
    """Milliseconds by stage; a dash where there is no such stage, or the runtime does not tell."""
    headers = ["artefact", *(f"{stage.replace('_', ' ')}, ms" for stage in STAGES), "host to host, ms"]
    rows = [
        [name, *(number(row["stages_ms"].get(stage)) for stage in STAGES), number(row["p50_ms"])]
        for name, row in zip(names_of(report), report["artifacts"], strict=True)
    ]
    return headers, rows


def costs(report: dict[str, Any]) -> Table:
    """What it takes besides time."""
    headers = [
        "artefact",
        "parameters, M",
        "GFLOP",
        "memory, MB",
        "start, s",
        "of peak arithmetic, %",
        "of peak bandwidth, %",
    ]
    rows = []
    for name, row in zip(names_of(report), report["artifacts"], strict=True):
        parameters = None if row["parameters"] is None else row["parameters"] / 1e6
        shares = [None if row[key] is None else 100 * row[key] for key in ("compute_share", "bandwidth_share")]
        cells = [number(parameters), number(row["gflops"]), number(row["memory_mb"], 0), number(row["start_s"])]
        rows.append([name, *cells, *(number(share, 0) for share in shares)])
    return headers, rows


def gpu(report: dict[str, Any]) -> Table | None:
    """Power and clocks; None where no artefact ran on a GPU that tells."""
    headers = [
        "artefact",
        "power, W",
        "energy per frame, mJ",
        "SM clock, MHz",
        "memory clock, MHz",
        "°C",
        "GPU memory, MB",
        "held back",
    ]
    rows = []
    for name, row in zip(names_of(report), report["artifacts"], strict=True):
        use = row["throughput"]["gpu"]
        if use:
            counts = [str(use[key]) for key in ("sm_mhz", "memory_mhz", "temperature_c")]
            cells = [number(use["power_w"], 1), number(use["energy_mj_per_frame"], 1), *counts]
            rows.append([name, *cells, number(use["memory_used_mb"], 0), "yes" if use["throttled"] else "no"])
    return (headers, rows) if rows else None


def loadgen(report: dict[str, Any]) -> Table | None:
    """MLPerf's two scenarios; None where they were not asked for."""
    headers = ["artefact", "SingleStream, ms", "p90 of this run, ms", "valid", "Offline, samples/s", "valid"]
    rows = [
        [
            name,
            number(row["loadgen"]["single_stream_ms"]),
            number(row["loadgen"]["single_stream_p90_ms"]),
            "yes" if row["loadgen"]["single_stream_valid"] else "no",
            number(row["loadgen"]["offline_fps"], 1),
            "yes" if row["loadgen"]["offline_valid"] else "no",
        ]
        for name, row in zip(names_of(report), report["artifacts"], strict=True)
        if row["loadgen"]
    ]
    return (headers, rows) if rows else None


def loadgen_method(report: dict[str, Any]) -> str:
    """Return what is to be known about the load generator's figures; nothing where there are none."""
    seconds = next((row["loadgen"]["seconds"] for row in report["artifacts"] if row["loadgen"]), None)
    if seconds is None:
        return ""
    return f"At least {seconds} s for each scenario, shorter than MLPerf asks for: numbers to compare in kind, no submission."


def classes(report: dict[str, Any]) -> Table:
    """IoU of each class in percent, in the order of the label values."""
    rows = [
        [name, *(percent(row["per_class_iou"][name]) for row in report["artifacts"])]
        for name in report["artifacts"][0]["per_class_iou"]
    ]
    return ["class", *names_of(report)], rows


def losers_first(row: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return the class names, those first that lose most against the reference."""
    before, now = reference["per_class_iou"], row["per_class_iou"]

    def change(name: str) -> float:
        return float("inf") if before[name] is None or now[name] is None else now[name] - before[name]

    return sorted(now, key=change)


def noise(report: dict[str, Any]) -> list[str]:
    """Return everything that makes the timings less than certain, in words."""
    found = [f"during the timing, {text}" for text in report["noise"]]
    for name, row in zip(names_of(report), report["artifacts"], strict=True):
        found += [f"{name}: {', '.join(row['noise'])}"] if row["noise"] else []
    return found


def machine(report: dict[str, Any]) -> Table:
    """What it was measured on."""
    env, load = report["environment"], report["machine_load"]
    clocks = [load["mhz_before"], load["mhz_after"]]
    others, stolen = load["others_cores"], load["stolen_share"]
    rows = [
        ["CPU", f"{env['cpu']}, {env['cpu_cores']} cores, {', '.join(env['cpu_features']) or 'no vector extensions known'}"],
        ["clock before and after, MHz", " and ".join("–" if value is None else f"{value:.0f}" for value in clocks)],
        ["memory", f"{env['memory_gib']} GiB"],
        ["GPU", "; ".join(env["gpu"]) or "none"],
        *([f"measured peak, {device}", _peak(peak)] for device, peak in report["peak"].items()),
        ["busy with others", "unknown" if others is None else f"{others:.2f} cores; {100 * (stolen or 0):.1f} % taken by the hypervisor"],
        ["CPU threads", str(report["threads"] or "as the runtimes choose")],
        ["system", f"{env['system']}, Python {env['python']}"],
        ["packages", ", ".join(f"{name} {version}" for name, version in env["packages"].items())],
        ["aicsd-deploy", f"{report['provenance']['aicsd_deploy']}, git {env['git'] or 'unknown'}, {report['provenance']['created']}"],
    ]  # fmt: skip
    return ["", "measured on"], rows


def _peak(peak: dict[str, float] | None) -> str:
    if peak is None:
        return "unknown: PyTorch cannot use it"
    return f"{peak['gflops']:.1f} GFLOP/s in float32, {peak['bandwidth_gbs']:.1f} GB/s"


def method(report: dict[str, Any]) -> str:
    """Return how it was measured, in a paragraph."""
    rows = report["artifacts"]
    sizes = ", ".join(sorted({"x".join(map(str, row["image_size_hw"])) for row in rows}))
    reference = names_of(report)[report["reference"]]
    return (
        f"mIoU on {report['data']} ({report['split']}, {rows[0]['images']} images), at the size of the labels; agreement "
        f"with {reference}, in pixels. Latency is host to host, uint8 frame in and uint8 labels out (normalisation, "
        f"upsampling and argmax included), one frame at a time at {sizes} (HxW): {rows[0]['frames']} real frames per "
        "artefact after a warm-up until the time is stable, in rounds that every artefact has its turn in, spread over "
        "the scoring, no outlier dropped. The interval is where a repeat of the run would put the median, in 95 % of the "
        "cases (block bootstrap over rounds); jitter is the standard deviation. Stages come from a pass of their own with "
        "the runtime's profiler, which costs time itself, so they add up to about the median. Best fps: each artefact "
        "alone, in the batch that gives most. GFLOP counts convolutions and matrix products, a multiplication and an "
        "addition as two; the share of the peak is that of the float32 peak, also for INT8, and of the bandwidth if no "
        "layer found its input in a cache, so that it can exceed 100. Memory is the most that a fresh process held, its "
        "runtime included."
    )


def number(value: float | None, digits: int = 2) -> str:
    """Return a number for reading, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"
