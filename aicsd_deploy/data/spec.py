"""Data sets by name: `synthetic`, `camvid:PATH`, `folder:PATH`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aicsd_deploy.data.dataset import LabelledImage, SegmentationDataset
from aicsd_deploy.data.folder import open_camvid, open_folder
from aicsd_deploy.data.synthetic import CLASSES, render_scene
from aicsd_deploy.errors import InputError

_IN_FOLDERS: dict[str, Callable[[Path, str], SegmentationDataset]] = {"camvid": open_camvid, "folder": open_folder}
SPEC_HELP = "synthetic, camvid:PATH or folder:PATH"
SPLITS = ("train", "val", "test")


def open_dataset(spec: str, split: str) -> SegmentationDataset:
    """Open one split of a data set.

    Args:
        spec: `synthetic` (procedural street scenes, the same on every machine), `camvid:PATH` or `folder:PATH`.
        split: "train", "val" or "test".

    Raises:
        InputError: there is no such data set or split, or its folder has another layout.
    """
    if split not in SPLITS:
        raise InputError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
    if spec == "synthetic":
        return SyntheticDataset(split)
    name, _, path = spec.partition(":")
    if name not in _IN_FOLDERS or not path:
        raise InputError(f"{spec!r} is not a data set. Write {SPEC_HELP}.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"The data set folder {root} does not exist (working folder: {Path.cwd()}).")
    return _IN_FOLDERS[name](root, split)


class SyntheticDataset(SegmentationDataset):
    """Procedural street scenes; the splits are disjoint ranges of seeds."""

    _seeds = {"train": range(800), "val": range(1_000_000, 1_000_120), "test": range(2_000_000, 2_000_120)}  # noqa: RUF012

    def __init__(self, split: str) -> None:
        self.classes = CLASSES
        self.spec = "synthetic"
        self.split = split

    def __len__(self) -> int:
        return len(self._seeds[self.split])

    def name(self, index: int) -> str:
        return f"scene_{self._seeds[self.split][index]:07d}"

    def load(self, index: int) -> LabelledImage:
        return render_scene(self._seeds[self.split][index])
