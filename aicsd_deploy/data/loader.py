"""Batches of augmented pictures, in an order that depends on the seed alone, from any step onwards."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator
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
        images_BCHW: uint8, red, green, blue; larger than the labels where the teacher is to see more than the student.
        labels_BHW: class indices, 255 where ignored: int64, but uint8 until they are uploaded (an eighth of the bytes).
        step_labels_BHW: where this is a part of what the process sees in the step, the labels of all its parts.
    """

    images_BCHW: Tensor
    labels_BHW: Tensor
    step_labels_BHW: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device, copied without waiting where the memory is pinned."""
        labels = self.labels_BHW.to(device, non_blocking=True)
        return Batch(self.images_BCHW.to(device, non_blocking=True), labels.long())

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a GPU can copy from by itself; the loader calls it."""
        return Batch(self.images_BCHW.pin_memory(), self.labels_BHW.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """Return equal parts, in order."""
        if parts == 1:
            return [self]
        pairs = zip(self.images_BCHW.chunk(parts), self.labels_BHW.chunk(parts), strict=True)
        return [Batch(images, labels, self.labels_BHW) for images, labels in pairs]


class _Augmented(Dataset[tuple[Tensor, Tensor, int]]):
    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, key: _Key) -> tuple[Tensor, Tensor, int]:
        """Return a picture, its labels and the seed of the colours that it is to get."""
        image, labels = self.augmentation(self.dataset.load(key[1]), seed=derived_seed("augment", self.seed, *key))
        return image, labels, derived_seed("colors", self.seed, *key)


class _StepSampler(Sampler[list[_Key]]):
    """The batches of steps `start` to `total`, epoch after epoch, without a pause between epochs; of each, one share."""

    def __init__(
        self, length: int, batch_size: int, seed: int, start: int, total: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.length, self.batch_size, self.seed, self.start, self.total = length, batch_size, seed, start, total
        self.share = share

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
            rank, processes = self.share
            own = self.batch_size // processes
            first = position * self.batch_size + rank * own
            yield [(epoch, index) for index in order[first : first + own]]


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
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Yield the batches of steps `start_step` to `total_steps - 1` on a device, or of each the share of one of several processes.

    A step's batch is the same whatever step the loader starts from and however many workers and processes there are. Close the
    generator when it is not read to its end, so that its workers end.

    Args:
        batch_size: images of a step, over all processes.
        workers: processes that read, scale, crop and flip; 0: this one.
        device: where the batches go, and get other colours.
        share: (rank, number of processes), a number that divides `batch_size`.

    Raises:
        InputError: a file can no longer be read.
    """
    loader: DataLoader[Any] = DataLoader(
        _Augmented(dataset, augmentation, seed),
        batch_sampler=_StepSampler(len(dataset), batch_size, seed, start_step, total_steps, share),
        num_workers=workers,
        # Forked workers share the images that are kept in memory; Python 3.14 would copy them to each. Elsewhere fork is unsafe.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_leave_signals_to_the_parent,
        prefetch_factor=4 if workers else None,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    loaded = iter(loader)
    try:
        for batch, color_seeds in loaded:
            uploaded = batch.to(device)
            yield Batch(augmentation.recolor(uploaded.images_BCHW, seeds=color_seeds), uploaded.labels_BHW)
    except InputError as error:  # that of a worker comes behind its traceback
        raise InputError(str(error).rpartition("InputError: ")[2].rstrip()) from error
    finally:
        if workers:
            # Left to the garbage collector, they outlive an error that refers to them; and since they ignore SIGTERM, Python
            # would wait for them for ever when it ends.
            loaded._shutdown_workers()  # type: ignore[attr-defined]
            for worker in loaded._workers:  # type: ignore[attr-defined]
                if worker.is_alive():  # stuck, in a file on a server that does not answer for one
                    worker.kill()
                    worker.join()


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Schedulers and Ctrl-C ask every process of a job to stop; the training process then saves, and for that its workers must live."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[tuple[Tensor, Tensor, int]]) -> tuple[Batch, list[int]]:
    images, labels, color_seeds = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.stack(labels)), list(color_seeds)
