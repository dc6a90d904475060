"""Pictures of a study: learning curves, gain of each class, and a strip of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.runtime.base import Backend
from aicsd_deploy.runtime.frames import scaled
from aicsd_deploy.runtime.torch_backend import TorchBackend, choose_device
from aicsd_deploy.teachers import open_teacher
from aicsd_deploy.tracking import draw_overlays, pyplot, save_figure
from aicsd_deploy.training.last import LAST

STRIP_METHODS = 4
"""With frame, truth and teacher, as many tiles as stay large enough to see something."""
TILE_WIDTH, STRIP_IMAGES = 320, 4


def plot_study(study: dict[str, Any], out: Path) -> list[Path]:
    """Draw curves.png (validation mIoU over the epochs) and classes.png (gain of each class over CE) into `out`."""
    made = [_plot_curves(study, out / "curves.png")]
    if "none" in study["methods"] and len(study["methods"]) > 1:
        made.append(_plot_classes(study, out / "classes.png"))
    return made


def draw_strip(study: dict[str, Any], dataset: SegmentationDataset, out: Path) -> Path:
    """Draw strip.png: rows of frame, truth, then what methods (of the first seed, see `strip_methods`) and the teacher make of it."""
    chosen = strip_methods(study["methods"])
    device = choose_device("auto")
    backends: dict[str, Backend] = {}
    for name in chosen:
        checkpoint = load_checkpoint(out / "cells" / f"{name}-seed{study['seeds'][0]}" / LAST)
        if checkpoint.training["ema"] is not None:  # which is what the cell's score is of
            checkpoint = replace(checkpoint, model=checkpoint.training["ema"])
        backends["CE" if name == "none" else name] = TorchBackend(
            checkpoint.build(), checkpoint.metadata, device=device
        )
    if study["teacher"] is not None:
        backends["teacher"] = _teacher_backend(study, dataset, checkpoint.metadata, device)
    path = out / "strip.png"
    draw_overlays(backends, dataset, path, width=TILE_WIDTH, count=STRIP_IMAGES)
    return path


def strip_methods(methods: dict[str, dict[str, Any]]) -> list[str]:
    """Return up to four methods in the study's order: CE, to compare with, and the best of the others by their mean score."""
    best_first = sorted(methods, key=lambda name: (name != "none", -methods[name]["miou_mean"]))[:STRIP_METHODS]
    return [name for name in methods if name in best_first]


def _teacher_backend(
    study: dict[str, Any], dataset: SegmentationDataset, student: Metadata, device: torch.device
) -> Backend:
    class_map = study["recipe"]["class_map"]
    size_hw = scaled(student.image_size_hw, study["recipe"]["teacher_scale"])
    teacher = open_teacher(
        study["teacher"]["path"],
        dataset.classes,
        class_map=None if class_map is None else Path(class_map),
        size_hw=size_hw,
    )
    metadata = teacher.metadata.replace(image_size_hw=size_hw)
    return TorchBackend(teacher.network, metadata, device=device)


def _plot_curves(study: dict[str, Any], path: Path) -> Path:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for name in study["methods"]:
        curves = [cell["curve"] for cell in study["cells"] if cell["name"] == name]
        epochs = [epoch for epoch, _ in curves[0]]
        scores = np.array([[100 * score for _, score in curve] for curve in curves])
        (line,) = axis.plot(epochs, scores.mean(axis=0), "o-", markersize=3, label="CE" if name == "none" else name)
        if len(curves) > 1:
            axis.fill_between(epochs, scores.min(axis=0), scores.max(axis=0), color=line.get_color(), alpha=0.12)
    if study["teacher"] is not None:
        axis.axhline(100 * study["teacher"]["miou"], linestyle="--", color="grey", label="teacher")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # there is no epoch 0.96
    axis.set(xlabel="epoch", ylabel="val mIoU, %", title="mean over the seeds, and their range")
    axis.legend()
    return save_figure(figure, path)


def _plot_classes(study: dict[str, Any], path: Path) -> Path:
    plt = pyplot()
    base = study["methods"]["none"]["per_class_iou_mean"]
    names = [n for n in study["methods"] if n != "none"]
    gain = np.array(
        [[_gain(study["methods"][n]["per_class_iou_mean"][c], base[c]) for c in base] for n in names], dtype=np.float64
    )
    figure, axis = plt.subplots(figsize=(3 + 0.6 * len(base), 2 + 0.4 * len(names)), constrained_layout=True)
    reach = min(max(float(np.nanmax(np.abs(gain))), 1.0), 20.0)  # a method that fails must not wash out the others
    image = axis.imshow(gain, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    for row, column in np.ndindex(gain.shape):
        if np.isfinite(gain[row, column]):
            color = "white" if abs(gain[row, column]) > 0.6 * reach else "black"
            axis.text(column, row, f"{gain[row, column]:+.1f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(base)), list(base), rotation=60, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(title="IoU of each class minus that of CE, points")
    figure.colorbar(image, ax=axis, shrink=0.8)
    return save_figure(figure, path)


def _gain(ours: float | None, theirs: float | None) -> float:
    return float("nan") if ours is None or theirs is None else 100 * (ours - theirs)
