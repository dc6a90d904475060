"""Looking at a whole data set before training starts, so that a bad file stops a run at its first minute, not its last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aicsd_deploy.console import progress, table
from aicsd_deploy.data.dataset import CachedDataset, FileDataset, SegmentationDataset, evenly_spread
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import write_png
from aicsd_deploy.metadata import IGNORE_LABEL
from aicsd_deploy.video.overlay import Overlay

MOST_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class DataReport:
    """What is in one split.

    Attributes:
        pixels: how many pixels each class has, int64 (C + 1); the last entry counts the ignored ones.
        images_with: in how many images each class occurs, int64 (C + 1).
        sizes_hw: the sizes of the images, with how often each occurs.
    """

    dataset: SegmentationDataset
    pixels: npt.NDArray[np.int64]
    images_with: npt.NDArray[np.int64]
    sizes_hw: dict[tuple[int, int], int]

    def to_text(self) -> str:
        """Return a table of the classes with their train ids (what `load` gives, not what the masks hold), pixels and images."""
        total = max(int(self.pixels.sum()), 1)
        names = [*(c.name for c in self.dataset.classes), "ignored"]
        ids = [*(str(i) for i in range(len(self.dataset.classes))), str(IGNORE_LABEL)]
        rows = [
            [name, i, f"{n}", f"{100 * n / total:.2f}", f"{k}"]
            for name, i, n, k in zip(names, ids, self.pixels, self.images_with, strict=True)
        ]
        sizes = ", ".join(
            f"{h}x{w} ({n})" for (h, w), n in sorted(self.sizes_hw.items(), key=lambda item: -item[1])[:5]
        )
        head = f"{self.dataset.spec}, {self.dataset.split}: {len(self.dataset)} images, HxW {sizes}"
        return head + "\n" + table(["class", "train id", "pixels", "% of all", "in images"], rows)

    def to_dict(self) -> dict[str, Any]:
        """Return what `teacher.py --check-data --json` writes for a split."""
        names = [*(c.name for c in self.dataset.classes), "ignored"]
        return {
            "data": self.dataset.spec,
            "split": self.dataset.split,
            "images": len(self.dataset),
            "sizes_hw": {f"{h}x{w}": n for (h, w), n in self.sizes_hw.items()},
            "pixels": dict(zip(names, self.pixels.tolist(), strict=True)),
            "images_with": dict(zip(names, self.images_with.tolist(), strict=True)),
        }


def check_dataset(dataset: SegmentationDataset) -> DataReport:
    """Load every image and its labels once.

    Raises:
        InputError: with up to ten of the files that cannot be used, each with the reason; or no pixel has a label, or those of
            the training images all have the same.
    """
    classes = len(dataset.classes)
    counts = np.zeros((len(dataset), classes + 1), dtype=np.int64)
    sizes: dict[tuple[int, int], int] = {}
    problems: list[str] = []

    def look(index: int) -> tuple[int, int] | InputError:
        try:
            image, labels = dataset.load(index)
        except InputError as error:
            return error
        found = np.bincount(labels.ravel(), minlength=256)
        counts[index] = [*found[:classes], found[IGNORE_LABEL]]
        return (image.shape[0], image.shape[1])

    with ThreadPoolExecutor(8) as pool, progress(f"checking {dataset.spec} ({dataset.split})", len(dataset)) as advance:
        for result in pool.map(look, range(len(dataset))):
            advance()
            if isinstance(result, InputError):
                problems.append(str(result))
            else:
                sizes[result] = sizes.get(result, 0) + 1
    if problems:
        more = f"\n… and {len(problems) - MOST_PROBLEMS_SHOWN} more" if len(problems) > MOST_PROBLEMS_SHOWN else ""
        raise InputError(
            f"{len(problems)} of {len(dataset)} images of {dataset.spec} ({dataset.split}) cannot be used:\n"
            + "\n".join(_with_advice_once(problems[:MOST_PROBLEMS_SHOWN]))
            + more
        )
    if all(dataset.is_grey(index) for index in range(len(dataset))):
        raise InputError(
            f"Every image of {dataset.spec} ({dataset.split}) has one channel, but networks here take red, green and blue. "
            "Usually these are masks in the place of images. If they are grey pictures, save them with three equal channels "
            "(Pillow: Image.open(path).convert('RGB').save(path)), as the frames of a grey camera will be given."
        )
    occurring = np.flatnonzero(counts[:, :classes].any(axis=0))
    if not occurring.size:
        raise InputError(
            f"No pixel of {dataset.spec} ({dataset.split}) has a class: all are ignored. Take masks or a split with labels."
        )
    if occurring.size == 1 and dataset.split == "train":
        raise InputError(
            f"All labelled pixels of {dataset.spec} (train) are {dataset.classes[occurring[0]].name!r}, so there is nothing to "
            "tell apart. Look at the values in the masks: 255 is ignored, so that masks of 0 and 255 hold one class; write 1 in "
            "the place of 255."
        )
    return DataReport(dataset, counts.sum(axis=0), (counts > 0).sum(axis=0), sizes)


def _with_advice_once(problems: list[str]) -> list[str]:
    """Return messages with what they say after their first sentence only once where it is the same for several."""
    by_advice: dict[str, list[str]] = {}
    for problem in problems:
        by_advice.setdefault(problem.partition(". ")[2], []).append(problem)
    lines = []
    for advice, given in by_advice.items():
        if advice and len(given) > 1:
            lines += [*(problem.removesuffix(f" {advice}") for problem in given), advice]
        else:
            lines += given
    return lines


def check_splits(train: SegmentationDataset, val: SegmentationDataset) -> None:
    """Raise InputError if an image file is in both splits: a score on images that were trained on says nothing."""
    ours, theirs = _files(train), _files(val)
    shared = sorted(name for name in ours.keys() & theirs.keys() if _same_file(ours[name], theirs[name]))
    if shared:
        raise InputError(
            f"{len(shared)} of the {len(theirs)} images of {val.spec} ({val.split}) are in {train.split} too, {shared[0]} for "
            f"one: its score would be of images that were trained on. Take them out of one of the two splits."
        )


def _files(dataset: SegmentationDataset) -> dict[str, Path]:
    plain = dataset.dataset if isinstance(dataset, CachedDataset) else dataset
    return {pair.image.name: pair.image for pair in plain.pairs} if isinstance(plain, FileDataset) else {}


def _same_file(a: Path, b: Path) -> bool:
    return a == b or (a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes())


def write_overlays(dataset: SegmentationDataset, folder: Path, *, count: int = 6) -> list[Path]:
    """Write a few images with their labels blended over them, evenly spread over the data set, as PNG files."""
    overlay = Overlay(dataset.classes, opacity=0.6)
    paths = []
    for index in evenly_spread(len(dataset), count):
        frame, labels = dataset.load_bgr(index)
        picture = np.hstack([frame, overlay.draw(frame.copy(), labels)])
        path = folder / f"{dataset.split}_{dataset.name(index)}.png"
        write_png(path, picture)
        paths.append(path)
    return paths
