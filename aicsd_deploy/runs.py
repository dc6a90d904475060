"""Run folders: where they are, what lies in them, and which one a command takes when none is named."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import onnx_says

RUNS = Path("runs")


def new_run_folder(name: str) -> Path:
    """Return a folder under runs/ that is not there yet, named by the time and `name`."""
    return RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"


def newest_checkpoint(*, role: str, data: str | None = None) -> Path | None:
    """Return best.pt of the newest finished run of a role ("teacher" or "student"), distilled students first, cells of a study last.

    It goes by summary.json, which is written when a run ends, so that half-trained networks are passed over.
    """
    found = [
        (
            path.parent.parent.name != "cells",
            summary.get("method", "none") != "none",
            path.stat().st_mtime,
            path.with_name("best.pt"),
        )
        for path, summary in _summaries()
        if summary.get("role") == role and data in (None, summary.get("data")) and path.with_name("best.pt").is_file()
    ]
    return max(found)[-1] if found else None


def newest_artifact(*, float_only: bool = False, fast: bool = False) -> Path:
    """Return the newest exported student under runs/, or the newest student's checkpoint where none is exported, and say which.

    Args:
        float_only: pass over files that are quantised, for commands that need a float32 one.
        fast: pass over INT8 files in the form that TensorRT takes: they run as they are, but more slowly than float32.

    Raises:
        InputError: there is neither.
    """
    exported = sorted(RUNS.rglob("student*.onnx"), key=lambda path: path.stat().st_mtime)
    fitting = (
        path
        for path in reversed(exported)
        if (not float_only or onnx_says(path, "precision", "fp32"))
        and not (fast and any(onnx_says(path, "int8_target", target) for target in ("tensorrt", "both")))
    )
    artifact = next(fitting, None) or newest_checkpoint(role="student")
    if artifact is None:
        raise InputError(
            f"No artefact was given and there is no finished student under {RUNS.resolve()}. "
            "Name one, or make one first: python train/distill.py"
        )
    say(f"No artefact is named: this takes {artifact}")
    return artifact


def newest_comparison() -> list[Path]:
    """Return what a benchmark without arguments compares: the newest student's teacher, the student, its exported file.

    Raises:
        InputError: there is no student.
    """
    student = newest_checkpoint(role="student")
    if student is None:
        return [newest_artifact()]
    summary = json.loads(student.with_name("summary.json").read_text(encoding="utf-8"))
    teacher: str = summary["teacher"]["path"] if summary.get("teacher") else ""
    # A file exported from this very student lies beside it, or one folder up where the demo puts it.
    beside = [*student.parent.glob("student*.onnx"), *student.parent.parent.glob("student*.onnx")]
    exported = sorted(beside, key=lambda path: path.stat().st_mtime)[-1:]
    exported = [path for path in exported if path.stat().st_mtime >= student.stat().st_mtime]
    if teacher and not teacher.endswith(".pt"):
        say(f"To have its teacher measured too, export it first: python export/to_onnx.py {teacher} --data SPEC")
    teachers = [Path(teacher)] if teacher.endswith(".pt") and Path(teacher).is_file() else []
    return [*teachers, student, *exported]


def _summaries() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in RUNS.rglob("summary.json"):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict):
            yield path, summary
