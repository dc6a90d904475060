"""Scores of segmentations, from one confusion matrix over the whole data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import IGNORE_LABEL
from aicsd_deploy.runtime.base import UInt8Array


class ConfusionMatrix:
    """Counts of pixels, int64 (C, C): rows are the true class, columns the predicted one."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts: npt.NDArray[np.int64] = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.images = 0

    def add(self, predicted_HW: UInt8Array, labels_HW: UInt8Array) -> None:
        """Count one image; pixels labelled 255 are left out.

        Args:
            predicted_HW: uint8 (H, W), class indices below C.
            labels_HW: uint8 (H, W), class indices below C or 255.
        """
        if predicted_HW.shape != labels_HW.shape:
            raise ValueError(f"prediction {predicted_HW.shape} and labels {labels_HW.shape} differ in size")
        kept = labels_HW != IGNORE_LABEL
        pairs = self.num_classes * labels_HW[kept].astype(np.int64) + predicted_HW[kept]
        if pairs.size and (predicted_HW[kept].max() >= self.num_classes or labels_HW[kept].max() >= self.num_classes):
            raise ValueError(f"a label or a prediction is not below the number of classes, {self.num_classes}")
        self.counts += np.bincount(pairs, minlength=self.num_classes**2).reshape(self.counts.shape)
        self.images += 1

    def scores(self, class_names: list[str]) -> Scores:
        """Work the scores out; a class that is neither in the labels nor predicted has none and counts in no mean.

        Raises:
            InputError: no pixel has a label.
        """
        if not self.counts.any():
            raise InputError(
                f"No pixel of the {self.images} images has a label, so nothing can be scored. Give images that have labels "
                "(--data, --split, --labels)."
            )
        hits = np.diag(self.counts).astype(np.float64)
        truth, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        with np.errstate(invalid="ignore"):
            iou = hits / (truth + predicted - hits)
            accuracy = hits / truth
        return Scores(
            miou=_mean(iou),
            per_class_iou={n: None if np.isnan(v) else float(v) for n, v in zip(class_names, iou, strict=True)},
            pixel_accuracy=float(hits.sum() / self.counts.sum()),
            mean_class_accuracy=_mean(accuracy),
            images=self.images,
            label_pixels=dict(zip(class_names, truth.tolist(), strict=True)),
        )


@dataclass(frozen=True)
class Scores:
    """How good a segmentation is, all in fractions from 0 to 1.

    Attributes:
        miou: mean over the classes of intersection over union.
        per_class_iou: intersection over union by class name; None for a class that never occurs.
        pixel_accuracy: share of the labelled pixels that are right.
        mean_class_accuracy: mean over the classes that occur of the share of their pixels that are right.
        images: how many images were scored.
        label_pixels: how many pixels the labels give to each class, by its name.
    """

    miou: float
    per_class_iou: dict[str, float | None]
    pixel_accuracy: float
    mean_class_accuracy: float
    images: int
    label_pixels: dict[str, int]

    @property
    def labelled_miou(self) -> float:
        """mIoU over the classes that the labels have: one stray pixel of another class, whose IoU is then 0, moves `miou` a lot."""
        found = [iou for name, iou in self.per_class_iou.items() if self.label_pixels[name] and iou is not None]
        return sum(found) / len(found)

    def to_dict(self) -> dict[str, Any]:
        """Return what `summary.json`, `evaluate.py --json` and `report.json` hold."""
        return asdict(self)


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values[~np.isnan(values)].mean())
