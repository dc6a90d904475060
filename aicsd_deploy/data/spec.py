"""Data sets by name: `synthetic`, `synthetic:HxW`, or `NAME:PATH`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from aicsd_deploy.cli import size_hw
from aicsd_deploy.data.camvid import open_camvid
from aicsd_deploy.data.cityscapes import open_cityscapes
from aicsd_deploy.data.dataset import LabelledImage, SegmentationDataset
from aicsd_deploy.data.folder import open_folder
from aicsd_deploy.data.synthetic import CLASSES, render_scene
from aicsd_deploy.data.voc import open_voc, open_vocaug
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import plain_text

_IN_FOLDERS: dict[str, Callable[[Path, str], SegmentationDataset]] = {
    "camvid": open_camvid,
    "cityscapes": open_cityscapes,
    "voc": open_voc,
    "vocaug": open_vocaug,
    "folder": open_folder,
}
SPEC_HELP = f"synthetic (or synthetic:HxW), {', '.join(f'{name}:PATH' for name in _IN_FOLDERS)}"
SPLITS = ("train", "val", "test")
_SCENES = {"train": range(600), "val": range(1_000_000, 1_000_120), "test": range(2_000_000, 2_000_120)}
"""The seeds of the synthetic scenes by split."""
DEFAULT_SIZE_HW = (96, 128)
"""Small enough that two CPU cores train on it in minutes."""


def open_dataset(spec: str, split: str) -> SegmentationDataset:
    """Open one split of a data set.

    Args:
        spec: `synthetic` (procedural street scenes of 96x128, the same on every machine), `synthetic:HxW` (the same scenes at
            another size), or `NAME:PATH` for the layouts in `_IN_FOLDERS`.
        split: "train", "val" or "test".

    Raises:
        InputError: there is no such data set or split, its folder has another layout, or a name that no artefact may carry.
    """
    if split not in SPLITS:
        raise InputError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
    try:
        plain_text(spec)
    except ValueError as error:
        raise InputError(
            f"The data set {error}, and what is trained on it names it: no command would open that. Rename the folder."
        ) from None
    name, _, path = spec.partition(":")
    if name == "synthetic":
        try:
            return SyntheticDataset(split, size_hw(path) if path else DEFAULT_SIZE_HW, spec)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{spec!r} is not a data set: {error}.") from None
    if name not in _IN_FOLDERS or not path:
        meant = f" Did you mean folder:{spec}?" if Path(spec).expanduser().is_dir() else ""
        raise InputError(f"{spec!r} is not a data set. Write {SPEC_HELP}.{meant}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"The data set folder {root} does not exist (working folder: {Path.cwd()}).")
    return _IN_FOLDERS[name](root, split)


class SyntheticDataset(SegmentationDataset):
    """Procedural street scenes."""

    def __init__(self, split: str, size_hw: tuple[int, int], spec: str) -> None:
        self.classes = CLASSES
        self.spec = spec
        self.split = split
        self.size_hw = size_hw
        self._seeds = _SCENES[split]

    def __len__(self) -> int:
        return len(self._seeds)

    def name(self, index: int) -> str:
        return f"scene_{self._seeds[index]:07d}"

    def load(self, index: int) -> LabelledImage:
        return render_scene(self._seeds[index], size_hw=self.size_hw)
