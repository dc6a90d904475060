"""Any backend, scored on any data set, at the size of its labels."""

from __future__ import annotations

import numpy as np

from aicsd_deploy.console import progress
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.metrics import ConfusionMatrix
from aicsd_deploy.runtime.base import Backend
from aicsd_deploy.runtime.frames import segment


def evaluate(
    backend: Backend, dataset: SegmentationDataset, *, title: str = "scoring", share: tuple[int, int] = (0, 1)
) -> ConfusionMatrix:
    """Segment every image as the backend would in use (`segment`) and count the pixels.

    Args:
        share: (k, n) takes images k, k + n, k + 2n, … only, so that n processes share the work.

    Raises:
        InputError: the artefact and the data set have other classes, so that a score would mean nothing.
    """
    check_same_classes(backend.metadata.classes, dataset.classes, spec=dataset.spec)
    matrix = ConfusionMatrix(len(dataset.classes))
    indices = range(share[0], len(dataset), share[1])
    with progress(title, len(indices)) as advance:
        for index in indices:
            image_rgb, labels = dataset.load(index)
            matrix.add(segment(backend, np.ascontiguousarray(image_rgb[..., ::-1])), labels)
            advance()
    return matrix


def check_same_classes(ours: tuple[SegClass, ...], theirs: tuple[SegClass, ...], *, spec: str) -> None:
    """Raise InputError unless an artefact has the very classes, in order, of the data set `spec`."""
    ours_named, theirs_named = [c.name for c in ours], [c.name for c in theirs]
    if ours_named != theirs_named:
        raise InputError(
            f"The artefact's classes are not those of {spec}, so its labels mean something else.\n"
            f"  artefact: {len(ours)} classes: {', '.join(ours_named)}\n"
            f"  data set: {len(theirs)} classes: {', '.join(theirs_named)}\n"
            "Give the data set that the network was trained for."
        )
