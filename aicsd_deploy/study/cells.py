"""A study is a grid of cells, one training for each method and seed; each is run once and kept in its own folder."""

from __future__ import annotations

import gc
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from aicsd_deploy.config import DistillConfig, TrainConfig, validated
from aicsd_deploy.console import say
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import write_json
from aicsd_deploy.metadata import git_revision
from aicsd_deploy.recipes import distill, settings_for_teacher, train_teacher
from aicsd_deploy.study.config import StudyConfig
from aicsd_deploy.teachers import open_teacher
from aicsd_deploy.tracking import read_log
from aicsd_deploy.training.last import BEST
from aicsd_deploy.training.resume import FREE_TO_CHANGE, changes, check_same_run
from aicsd_deploy.training.start import settled
from aicsd_deploy.training.timing import peak_memory_gib

CELL = "cell.json"


def run_study(config: StudyConfig, out: Path) -> list[dict[str, Any]]:
    """Run every cell that is not done yet, and return what all of them gave, in the order of methods and seeds.

    Seeds are the outer loop, so that a study that is stopped early has whole rows of methods to compare.

    Raises:
        InputError: a name is unknown, a teacher cannot be used, or a cell in `out` was run with other settings or another teacher.
    """
    if config.qat != "off" and config.init is None:
        raise InputError("A study with --qat needs --init STUDENT, so that every cell goes on with the same student.")
    own_teacher = str(out / "teacher" / BEST)
    teacher = own_teacher if config.teacher is None else config.teacher
    planned = {(n, s): config.cell(n, s, teacher=teacher) for s in config.seeds for n in config.methods}
    if config.teacher is None and any(settings.teacher == own_teacher for settings in planned.values()):
        _train_own_teacher(config, out / "teacher")
    sha256_of = lru_cache(_sha256_of_teacher)  # most cells have the same
    teachers = {  # for all cells now, so that one that cannot be used is told at once
        cell: sha256_of(s.teacher, s.data, s.class_map, s.teacher_size)
        for cell, s in planned.items()
        if s.teacher is not None
    }
    cells = {}
    for number, ((name, seed), settings) in enumerate(planned.items(), start=1):
        say(f"cell {number}/{len(planned)}: {name}, seed {seed}")
        folder = out / "cells" / f"{name}-seed{seed}"
        cells[name, seed] = _finished_cell(settings, folder, teachers.get((name, seed))) or _run_cell(
            settings, name, folder
        )
    return [cells[name, seed] for name in config.methods for seed in config.seeds]


def _train_own_teacher(config: StudyConfig, folder: Path) -> None:
    """Train the study's teacher, unless that is done. Raise InputError where it was trained by another recipe."""
    wanted = validated(TrainConfig, settings_for_teacher(config) | config.teacher_recipe)
    summary = folder / "summary.json"
    if summary.is_file():
        trained = json.loads(summary.read_text(encoding="utf-8"))["config"]
        check_same_run(settled(wanted, folder).model_dump(mode="json"), trained, folder=folder)
    else:
        train_teacher(wanted, folder, resume=True)


def _finished_cell(settings: DistillConfig, folder: Path, teacher_sha256: str | None) -> dict[str, Any] | None:
    """Return what a cell gave; None where it is not done yet. Raise InputError where it was another one."""
    if not (folder / CELL).is_file():
        return None
    cell: dict[str, Any] = json.loads((folder / CELL).read_text(encoding="utf-8"))
    ours = settings.model_dump(mode="json")
    theirs = DistillConfig().model_dump(mode="json") | cell["settings"]  # what an older version did not know was so
    lines = [f"  {text}" for name, text in changes(ours, theirs).items() if name not in FREE_TO_CHANGE]
    was, now = cell.get("teacher_sha256"), teacher_sha256
    if was is not None and now is not None and was != now:  # cells without a teacher, or of an older version, have none
        lines.append(f"  teacher: was {cell['teacher']['path']} ({was[:12]}…), now {settings.teacher} ({now[:12]}…)")
    if lines:
        raise InputError(
            f"{folder} was run with other settings, and its score would not compare:\n"
            + "\n".join(lines)
            + "\nGive the same, another --out, or remove that folder."
        )
    return cell


def _run_cell(settings: DistillConfig, name: str, folder: Path) -> dict[str, Any]:
    """Train a cell, or go on with it, and keep what it gave."""
    _reset_peak_memory()
    summary = distill(settings, folder, resume=True)
    scored = [line for line in read_log(folder) if "val" in line]
    cell = {
        "name": name,
        "seed": settings.seed,
        "miou": scored[-1]["val"]["miou"],
        "per_class_iou": scored[-1]["val"]["per_class_iou"],
        "best_miou": summary["miou"],
        "curve": [[line["epoch"], line["val"]["miou"]] for line in scored],
        "seconds": summary["seconds"],
        "peak_memory_mib": round(1024 * peak_memory_gib(cuda=torch.cuda.is_available()), 1),
        "teacher": summary["teacher"],
        "teacher_sha256": summary["provenance"].get("teacher_sha256"),
        "parameters": summary["parameters"],
        "git": git_revision(),
        "settings": settings.model_dump(mode="json"),
    }
    write_json(folder / CELL, cell)
    return cell


def _sha256_of_teacher(name: str, data: str, class_map: Path | None, size_hw: tuple[int, int] | None) -> str:
    return open_teacher(name, open_dataset(data, "val").classes, class_map=class_map, size_hw=size_hw).digest


def _reset_peak_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of this process starts anew
    except OSError:
        return
