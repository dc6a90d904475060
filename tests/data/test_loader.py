"""The order and the augmentation of a step depend on the seed and the step alone."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aicsd_deploy.data.dataset import FileDataset, LabelledImage, SegmentationDataset
from aicsd_deploy.data.loader import Batch, steps_per_epoch, training_batches
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.data.transforms import Augmentation
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.runtime.frames import resize_image


def loader_of(
    root: Path,
    *,
    start: int = 0,
    workers: int = 0,
    seed: int = 0,
    total: int = 8,
    batch_size: int = 5,
    share: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    dataset = open_dataset(f"folder:{root}", "train")
    return training_batches(
        dataset,
        Augmentation((32, 40)),
        batch_size=batch_size,
        seed=seed,
        start_step=start,
        total_steps=total,
        workers=workers,
        device=torch.device("cpu"),
        share=share,
    )


def batches(root: Path, **options: Any) -> list[Batch]:
    return list(loader_of(root, **options))


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x.images_BCHW, y.images_BCHW) and torch.equal(x.labels_BHW, y.labels_BHW) for x, y in pairs)


def test_batches_are_alike_from_any_start_and_with_workers(folder_data: Path) -> None:
    everything = batches(folder_data)
    assert len(everything) == 8
    assert same(everything[3:], batches(folder_data, start=3))
    assert same(everything[4:], batches(folder_data, start=4, workers=2))
    assert not same(everything, batches(folder_data, seed=1))
    assert not same(everything[:2], everything[2:4]), "two epochs must differ"


class Alike(SegmentationDataset):
    """Eight images that are one and the same gradient, or that have their index as their grey level."""

    classes, spec, split = (SegClass("a", (0, 0, 0)), SegClass("b", (1, 1, 1))), "alike", "train"

    def __init__(self, *, numbered: bool) -> None:
        self.numbered = numbered

    def __len__(self) -> int:
        return 8

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> LabelledImage:
        grey = np.full((32, 40), index) if self.numbered else np.arange(32 * 40).reshape(32, 40) % 256
        return grey.astype(np.uint8)[..., None].repeat(3, 2), np.zeros((32, 40), np.uint8)


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation((32, 40), color_jitter=0), Augmentation((32, 40), (1.0, 1.0), flip=False)],
    ids=["cut", "colours"],
)
def test_every_picture_of_every_epoch_is_changed_in_its_own_way(augmentation: Augmentation) -> None:
    seen = drawn(Alike(numbered=False), augmentation)
    assert len({picture.numpy().tobytes() for picture in seen}) == 16


def test_every_epoch_shows_every_picture_once_in_another_order() -> None:
    plain = Augmentation((32, 40), (1.0, 1.0), flip=False, color_jitter=0)
    seen = [int(picture.max()) for picture in drawn(Alike(numbered=True), plain)]
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert len({tuple(seen[:8]), tuple(seen[8:]), tuple(range(8))}) == 3


def drawn(dataset: SegmentationDataset, augmentation: Augmentation, *, workers: int = 0) -> torch.Tensor:
    """Return the pictures of two epochs, in the order in which training sees them."""
    loader = training_batches(
        dataset,
        augmentation,
        batch_size=4,
        seed=0,
        start_step=0,
        total_steps=4,
        workers=workers,
        device=torch.device("cpu"),
    )
    return torch.cat([batch.images_BCHW for batch in loader])


def test_a_worker_that_is_stuck_does_not_outlive_its_loader(folder_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, loaded = FileDataset.load, 0

    def stuck_at_the_third(dataset: FileDataset, index: int) -> LabelledImage:
        nonlocal loaded
        loaded += 1
        if loaded == 3:
            time.sleep(30)
        return good(dataset, index)

    monkeypatch.setattr(FileDataset, "load", stuck_at_the_third)
    before = set(multiprocessing.active_children())
    loader = loader_of(folder_data, workers=1, batch_size=2)
    assert len(next(loader).labels_BHW) == 2
    assert set(multiprocessing.active_children()) > before
    loader.close()
    assert set(multiprocessing.active_children()) <= before, "Python would wait for it when it ends"


@pytest.mark.skipif(sys.platform != "linux", reason="fork is safe on Linux only")
def test_workers_share_what_is_in_memory_whatever_python_starts_processes_by() -> None:
    class Copied(Alike):
        def __reduce__(self) -> str:
            raise AssertionError("a worker gets a copy")

    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert len(drawn(Copied(numbered=True), Augmentation((32, 40)), workers=1)) == 16
    finally:
        multiprocessing.set_start_method(usual, force=True)


def test_shapes_types_and_the_global_generator(folder_data: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    batch = batches(folder_data, total=1)[0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert (batch.images_BCHW.shape, batch.images_BCHW.dtype) == ((5, 3, 32, 40), torch.uint8)
    assert (batch.labels_BHW.shape, batch.labels_BHW.dtype) == ((5, 32, 40), torch.int64)


def test_processes_and_parts_share_every_step_out(folder_data: Path) -> None:
    whole = batches(folder_data, batch_size=4)
    shares = [batches(folder_data, batch_size=4, share=(rank, 2)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        together = torch.cat([shares[0][step].images_BCHW, shares[1][step].images_BCHW])
        assert torch.equal(together, batch.images_BCHW)
        first, second = batch.split(2)
        assert torch.equal(torch.cat([first.labels_BHW, second.labels_BHW]), batch.labels_BHW)
        assert first.step_labels_BHW is batch.labels_BHW


def test_picture_and_labels_move_together_and_padding_is_ignored() -> None:
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 2, (6, 8)), np.ones((8, 8))).astype(np.uint8)
    image = np.repeat((labels * 200)[..., None], 3, axis=2)
    padded = 0
    for seed in range(20):
        picture, mask = Augmentation((48, 64), (0.5, 2.0), color_jitter=0.0)((image, labels), seed=seed)
        inside = mask != 255
        padded += int((~inside).sum() > 0)
        agree = (picture[0][inside] > 100) == (mask[inside] == 1)
        assert agree.float().mean() > 0.9, "only edges blurred by the resizing may differ"
        assert (picture[:, ~inside] == 114).all()
    assert 3 < padded < 17, "pictures are made smaller about half of the time"


def test_pictures_that_are_larger_than_their_labels_show_the_same() -> None:
    labels = np.kron(np.random.default_rng(0).integers(0, 2, (6, 8)), np.ones((8, 8))).astype(np.uint8)
    image = np.repeat((labels * 200)[..., None], 3, axis=2)
    for seed in range(10):
        picture, mask = Augmentation((48, 64), crop_size_hw=(40, 44), picture_scale=1.5)((image, labels), seed=seed)
        assert (picture.shape, mask.shape) == ((3, 60, 66), (40, 44))
        small, inside = F.interpolate(picture[None].float(), size=(40, 44), mode="area")[0, 0], mask != 255
        assert ((small > 100) == (mask == 1))[inside].float().mean() > 0.9
    whole = Augmentation((24, 32), (1.0, 1.0), flip=False, picture_scale=1.5)((image, labels), seed=0)
    assert torch.equal(whole[0], torch.from_numpy(resize_image(image, (36, 48))).permute(2, 0, 1)), "all of it"


def test_a_picture_is_stretched_or_covers_the_crop_in_its_proportions() -> None:
    wide = np.arange(40, dtype=np.uint8)[None].repeat(10, 0)
    for labels in (wide, wide.T.copy()):
        image = labels[..., None].repeat(3, 2)
        for keep_aspect, columns in ((False, {20}), (True, {10, 11})):
            augmentation = Augmentation((20, 20), (1.0, 1.0), flip=False, keep_aspect=keep_aspect)
            _, mask = augmentation((image, labels), seed=0)
            assert mask.shape == (20, 20)
            assert len(mask.unique()) in columns, "of the long side's 40, in a crop of 20"


def test_half_of_the_pictures_are_mirrored_unless_none_is_to_be() -> None:
    labels = np.arange(20, dtype=np.uint8)[None].repeat(20, 0)
    image = labels[..., None].repeat(3, 2)

    def mirrored(flip: bool) -> int:
        augmentation = Augmentation((20, 20), (1.0, 1.0), flip=flip)
        return sum(int(augmentation((image, labels), seed=seed)[1][0, 0] == 19) for seed in range(40))

    assert mirrored(False) == 0
    assert 10 < mirrored(True) < 30


def test_every_picture_gets_colours_by_its_own_seed() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation((8, 8), color_jitter=0.5)
    together = augmentation.recolor(images, seeds=[4, 5, 4])
    assert together.dtype == torch.uint8
    assert torch.equal(augmentation.recolor(images[1:2], seeds=[5]), together[1:2])
    assert not torch.equal(augmentation.recolor(images[1:2], seeds=[4]), together[1:2])
    assert torch.equal(Augmentation((8, 8), color_jitter=0.0).recolor(images, seeds=[4, 5, 4]), images)


def test_batch_size_larger_than_the_data_is_refused(folder_data: Path) -> None:
    with pytest.raises(InputError, match="more than the 12 training images"):
        steps_per_epoch(open_dataset(f"folder:{folder_data}", "train"), 13)
