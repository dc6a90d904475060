"""What a study found: means, spreads and paired differences of its cells, as JSON and as a page to read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.console import percent, table
from aicsd_deploy.study.config import StudyConfig

Cell = dict[str, Any]
CONFIDENCE = 0.95


def summarize(config: StudyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return what `study.json` holds.

    The score of a cell is the validation mIoU after its last epoch: the best epoch would be chosen on the images it is scored
    on. The gap that a method closes is (method - CE) / (teacher - CE), of the means, where the teacher is scored at the size
    that this method shows it.
    """
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell["name"], []).append(cell)
    teacher = _teacher(cells)
    methods = {}
    for name, group in by_name.items():
        scores = [cell["miou"] for cell in group]
        methods[name] = {
            "miou_mean": statistics.mean(scores),
            "miou_sd": statistics.stdev(scores) if len(scores) > 1 else None,
            "best_miou_mean": statistics.mean(cell["best_miou"] for cell in group),
            "gap_closed": _gap_closed(scores, by_name.get("none"), _teacher(group) or teacher),
            "minus_ce": paired_difference(group, by_name.get("none", [])) if name != "none" else None,
            "minus_kd": paired_difference(group, by_name.get("kd", [])) if name not in ("none", "kd") else None,
            "per_class_iou_mean": _per_class(group),
            "seconds_mean": statistics.mean(cell["seconds"] for cell in group),
            "peak_memory_mib": max(cell["peak_memory_mib"] for cell in group),
            "settings": config.variants.get(name, {"method": name}),
        }
    return {
        "data": config.data,
        "student": config.model,
        "image_size_hw": config.image_size,
        "epochs": config.epochs,
        "seeds": config.seeds,
        "teacher": teacher,
        "methods": methods,
        "cells": list(cells),
        "recipe": config.model_dump(mode="json"),
        "environment": environment(),
    }


def paired_difference(ours: Sequence[Cell], theirs: Sequence[Cell]) -> dict[str, Any] | None:
    """Return the mean over the common seeds of (ours - theirs), its standard error and its 95 % interval by Student's t.

    The two cells of a seed share weights and order of data, so their difference varies less than either score. None without a
    common seed; one seed has a mean and no interval.
    """
    other = {cell["seed"]: cell["miou"] for cell in theirs}
    differences = [cell["miou"] - other[cell["seed"]] for cell in ours if cell["seed"] in other]
    if not differences:
        return None
    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return {"mean": mean, "standard_error": None, "ci95": None, "seeds": 1}
    error = statistics.stdev(differences) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return {"mean": mean, "standard_error": error, "ci95": [mean - reach, mean + reach], "seeds": count}


def to_markdown(study: dict[str, Any], command: str) -> str:
    """Return `study.md`: the table, what the columns mean, the command and the machine."""
    shown = dict.fromkeys(percent(cell["teacher"]["miou"]) for cell in study["cells"] if cell["teacher"] is not None)
    rows = []
    for name, m in study["methods"].items():
        rows.append(
            [
                name,
                percent(m["miou_mean"]) + ("" if m["miou_sd"] is None else f" ± {percent(m['miou_sd'])}"),
                "–" if m["gap_closed"] is None else f"{100 * m['gap_closed']:.0f}",
                _difference(m["minus_ce"]),
                _difference(m["minus_kd"]),
                f"{m['seconds_mean']:.0f}",
                f"{m['peak_memory_mib']:.0f}",
            ]
        )
    headers = ["method", "val mIoU, %", "gap closed, %", "− CE [95 %]", "− KD [95 %]", "time, s", "MiB"]
    machine = study["environment"]
    facts = {k: v for k, v in machine.items() if isinstance(v, str | int | float)} | {
        "torch": machine["packages"]["torch"]
    }
    size = study["image_size_hw"]
    kind, _, place = study["data"].partition(":")
    return "\n".join(
        [
            f"# Study: {study['student']} on {kind}{place and ':' + Path(place).name}",
            "",
            f"    {command}",
            "",
            f"Seeds {', '.join(map(str, study['seeds']))}; {study['epochs']} epoch{'' if study['epochs'] == 1 else 's'}"
            + ("" if size is None else f", networks working at {size[0]}x{size[1]}")
            + ("" if not shown else f"; teacher {' or '.join(shown)} % at the size that it is shown")
            + ". Every method has the same recipe, weights and order of images for a seed.",
            "",
            table(headers, rows),
            "",
            *_collapsed(study["cells"]),
            "val mIoU: after the last epoch, mean ± standard deviation over the seeds. Gap closed: (method − CE) / (teacher − CE).",
            "− CE, − KD: mean difference of the cells of the same seed, in points, with its 95 % interval (Student's t).",
            "Time: wall-clock of a cell, checks and scoring included; of one that was stopped, only since it last went on.",
            "MiB: peak memory (the GPU's where there is one, else the process's).",
            "strip.png shows CE, the best of the other methods, up to four in all, and the teacher."
            if "none" in study["methods"]
            else "Without `none` (CE) among the methods there is no gap closed, no − CE and no classes.png: add it to --methods.",
            "",
            f"Machine: {', '.join(f'{k} {v}' for k, v in facts.items())}.",
            "",
        ]
    )


def _collapsed(cells: Sequence[Cell]) -> list[str]:
    """Return a warning where cells predict one class everywhere: those that do agree to the bit, as if methods were equal."""
    seeds: dict[str, list[str]] = {}
    for cell in cells:
        known = [iou for iou in cell["per_class_iou"].values() if iou is not None]
        if len(known) > 1 and sum(iou > 0 for iou in known) <= 1:
            seeds.setdefault(cell["name"], []).append(str(cell["seed"]))
    if not seeds:
        return []
    named = "; ".join(f"{name}, seed {', '.join(found)}" for name, found in seeds.items())
    return [
        f"**Collapsed to one class:** {named}. Scores of such cells, and differences from them, say nothing about a method: train "
        "longer, or change the learning rate.",
        "",
    ]


def _teacher(cells: Sequence[Cell]) -> dict[str, Any] | None:
    return next((cell["teacher"] for cell in cells if cell["teacher"] is not None), None)


def _gap_closed(scores: list[float], ce: list[Cell] | None, teacher: dict[str, Any] | None) -> float | None:
    if ce is None or teacher is None:
        return None
    base = statistics.mean(cell["miou"] for cell in ce)
    gap = teacher["miou"] - base
    return (statistics.mean(scores) - base) / gap if gap > 0 else None


def _per_class(group: Sequence[Cell]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in group[0]["per_class_iou"]:
        known = [cell["per_class_iou"][name] for cell in group if cell["per_class_iou"][name] is not None]
        means[name] = statistics.mean(known) if known else None
    return means


def _difference(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    mean = f"{100 * value['mean']:+.2f}"
    return mean if value["ci95"] is None else f"{mean} [{100 * value['ci95'][0]:+.2f}, {100 * value['ci95'][1]:+.2f}]"
