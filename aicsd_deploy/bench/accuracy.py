"""Several artefacts on the same images: scores, agreement with a reference, and the frames worth looking at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aicsd_deploy.console import progress
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.metadata import IGNORE_LABEL
from aicsd_deploy.metrics import ConfusionMatrix, Scores
from aicsd_deploy.runtime.base import Backend
from aicsd_deploy.runtime.frames import segment


@dataclass(frozen=True)
class Accuracy:
    """How good one artefact is.

    Attributes:
        scores: against the labels.
        agreement: share of all pixels that it labels as the reference does.
        worst_frame: index of the image on which it loses most pixels against the reference (against the labels, where it is
            the reference itself).
        typical_frame: index of the image that is the median in that.
    """

    scores: Scores
    agreement: float
    worst_frame: int
    typical_frame: int


def score_together(
    backends: Sequence[Backend],
    dataset: SegmentationDataset,
    *,
    reference: int,
    after_image: Callable[[int], None] = lambda _: None,
) -> list[Accuracy]:
    """Segment every image with every backend, as each would in use (`segment`), and count the pixels.

    Args:
        backends: the artefacts, of the classes of the data set.
        dataset: the labelled images.
        reference: which of the artefacts the others are held against.
        after_image: called with an image's index when all backends have segmented it.
    """
    matrices = [ConfusionMatrix(len(dataset.classes)) for _ in backends]
    alike, total = np.zeros(len(backends), np.int64), 0
    right = np.zeros((len(dataset), len(backends)))
    with progress("scoring", len(dataset)) as advance:
        for index in range(len(dataset)):
            frame, labels = dataset.load_bgr(index)
            found = [segment(backend, frame) for backend in backends]
            counted = labels != IGNORE_LABEL
            total += labels.size
            for i, (matrix, predicted) in enumerate(zip(matrices, found, strict=True)):
                matrix.add(predicted, labels)
                alike[i] += np.count_nonzero(predicted == found[reference])
                right[index, i] = ((predicted == labels) & counted).sum() / max(1.0, float(counted.sum()))
            after_image(index)
            advance()
    lost = right[:, [reference]] - right
    lost[:, reference] = 1 - right[:, reference]
    names = [c.name for c in dataset.classes]
    results = []
    for i, matrix in enumerate(matrices):
        order = np.argsort(-lost[:, i], kind="stable")
        results.append(
            Accuracy(
                matrix.scores(names), float(alike[i] / max(1, total)), int(order[0]), int(order[(len(order) - 1) // 2])
            )
        )
    return results
