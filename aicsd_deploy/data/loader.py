"""Batches of augmented pictures, in an order that depends on the seed alone, from any step onwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.data.transforms import Augmentation, derived_seed
from aicsd_deploy.errors import InputError

_Key = tuple[int, int]  # (epoch, index)


@dataclass(frozen=True)
class Batch:
    """What one training step sees.

    Attributes:
        images_BCHW: uint8, red, green, blue.
        labels_BHW: int64, class indices, 255 where ignored.
    """

    images_BCHW: Tensor
    labels_BHW: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device, copied without waiting where the memory allows it."""
        return Batch(self.images_BCHW.to(device, non_blocking=True), self.labels_BHW.to(device, non_blocking=True))


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, key: _Key) -> tuple[Tensor, Tensor]:
        return self.augmentation(self.dataset.load(key[1]), seed=derived_seed("augment", self.seed, *key))


class _StepSampler(Sampler[list[_Key]]):
    """The batches of steps `start` to `total`, epoch after epoch, without a pause between epochs."""

    def __init__(self, length: int, batch_size: int, seed: int, start: int, total: int) -> None:
        self.length, self.batch_size, self.seed, self.start, self.total = length, batch_size, seed, start, total

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[_Key]]:
        per_epoch = self.length // self.batch_size
        order: list[int] = []
        for step in range(self.start, self.total):
            epoch, position = divmod(step, per_epoch)
            if not order or position == 0:
                generator = torch.Generator().manual_seed(derived_seed("order", self.seed, epoch))
                order = torch.randperm(self.length, generator=generator).tolist()
            first = position * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size]]


def steps_per_epoch(dataset: SegmentationDataset, batch_size: int) -> int:
    """Return how many full batches an epoch has.

    Raises:
        InputError: not even one.
    """
    if len(dataset) < batch_size:
        raise InputError(f"--batch-size {batch_size} is more than the {len(dataset)} training images. Make it smaller.")
    return len(dataset) // batch_size


def training_batches(
    dataset: SegmentationDataset,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    workers: int,
    pin_memory: bool,
) -> Iterable[Batch]:
    """Return the batches of steps `start_step` to `total_steps - 1`.

    A step's batch is the same whatever step the loader starts from and however many workers there are.
    """
    loader: DataLoader[Any] = DataLoader(
        _Augmented(dataset, augmentation, seed),
        batch_sampler=_StepSampler(len(dataset), batch_size, seed, start_step, total_steps),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return loader  # of what the collate function makes


def _collate(pairs: list[tuple[Tensor, Tensor]]) -> Batch:
    return Batch(torch.stack([image for image, _ in pairs]), torch.stack([labels for _, labels in pairs]))
