"""Scoring that several processes share."""

from __future__ import annotations

import torch

from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.metrics import ConfusionMatrix
from aicsd_deploy.runtime.base import Backend
from aicsd_deploy.training import distributed


def evaluate_together(backend: Backend, dataset: SegmentationDataset, *, title: str) -> ConfusionMatrix:
    """Return the confusion matrix of a whole data set; each process segments its share, and no image counts twice."""
    matrix = evaluate(backend, dataset, title=title, share=(distributed.rank(), distributed.world_size()))
    matrix.counts = distributed.sum_over_processes(torch.from_numpy(matrix.counts)).numpy()
    matrix.images = int(distributed.sum_over_processes(torch.tensor(matrix.images)).item())
    return matrix
