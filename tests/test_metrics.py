"""Scores against torchmetrics, and what torchmetrics does not cover: ignored and absent classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.metrics import ConfusionMatrix


def test_agrees_with_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(5)
    images = []
    for _ in range(3):
        labels = rng.integers(0, 5, (20, 30), dtype=np.uint8)
        predicted = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 5, labels.shape)).astype(np.uint8)
        labels[rng.random(labels.shape) < 0.1] = 255
        matrix.add(predicted, labels)
        images.append((torch.from_numpy(predicted).long(), torch.from_numpy(labels).long()))
    predicted, labels = (torch.stack(parts) for parts in zip(*images, strict=True))
    scores = matrix.scores(list("abcde"))
    options = {"num_classes": 5, "ignore_index": 255}
    assert (matrix.counts == MulticlassConfusionMatrix(**options)(predicted, labels).numpy()).all()
    assert scores.miou == pytest.approx(MulticlassJaccardIndex(**options)(predicted, labels).item(), abs=1e-6)
    per_class = MulticlassJaccardIndex(average=None, **options)(predicted, labels).tolist()
    assert list(scores.per_class_iou.values()) == pytest.approx(per_class, abs=1e-6)
    micro = MulticlassAccuracy(average="micro", **options)(predicted, labels).item()
    assert scores.pixel_accuracy == pytest.approx(micro, abs=1e-6)
    macro = MulticlassAccuracy(average="macro", **options)(predicted, labels).item()
    assert scores.mean_class_accuracy == pytest.approx(macro, abs=1e-6)
    assert scores.images == 3


def test_absent_classes_count_in_no_mean_but_wrongly_predicted_ones_do() -> None:
    matrix = ConfusionMatrix(4)
    labels = np.array([[0, 0, 1, 1, 255]], np.uint8)
    matrix.add(np.array([[0, 2, 1, 1, 3]], np.uint8), labels)  # class 2 is only predicted, 3 only where ignored
    scores = matrix.scores(list("abcd"))
    assert scores.per_class_iou == {"a": 0.5, "b": 1.0, "c": 0.0, "d": None}
    assert scores.miou == pytest.approx(0.5)
    assert scores.labelled_miou == pytest.approx(0.75)
    assert scores.pixel_accuracy == pytest.approx(0.75)
    assert scores.mean_class_accuracy == pytest.approx(0.75)
    assert scores.label_pixels == {"a": 2, "b": 2, "c": 0, "d": 0}


def test_large_counts_do_not_overflow() -> None:
    matrix = ConfusionMatrix(2)
    matrix.counts[0, 0] = 2**40
    matrix.add(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert matrix.counts[0, 0] == 2**40 + 1


def test_labels_that_are_no_class_are_refused() -> None:
    zero, two = np.zeros((1, 1), np.uint8), np.full((1, 1), 2, np.uint8)
    for predicted, labels in ((zero, two), (two, zero)):
        with pytest.raises(ValueError, match="number of classes"):
            ConfusionMatrix(2).add(predicted, labels)
    with pytest.raises(ValueError, match="differ in size"):
        ConfusionMatrix(2).add(np.zeros((1, 2), np.uint8), np.zeros((1, 1), np.uint8))


def test_images_without_any_label_have_no_score(folder_data: Path) -> None:
    """As those of Cityscapes' test split."""
    for path in (folder_data / "val/labels").iterdir():
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    dataset = open_dataset(f"folder:{folder_data}", "val")
    backend = SimpleNamespace(device="cpu", metadata=SimpleNamespace(classes=dataset.classes))

    def segmenter(frame: np.ndarray) -> np.ndarray:
        return np.zeros(frame.shape[:2], np.uint8)

    matrix = evaluate(backend, dataset, segmenter=segmenter)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="No pixel of the 4 images has a label"):
        matrix.scores([c.name for c in dataset.classes])
