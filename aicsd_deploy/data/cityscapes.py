"""Cityscapes in its official layout: `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `gtFine/SPLIT/CITY/*_gtFine_labelIds.png`.

The masks hold the data set's label ids, 0 to 33 (and -1, the licence plate, which is 255 in a file of bytes). 19 of them are
the train ids that everybody scores; the rest are ignored. Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban
Scene Understanding", arXiv 1604.01685, and its `labels.py`.
"""

from __future__ import annotations

from pathlib import Path

from aicsd_deploy.data.dataset import FileDataset, FilePair
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import IGNORE_LABEL, SegClass

IMAGE_END, LABEL_END = "_leftImg8bit.png", "_gtFine_labelIds.png"
LABEL_IDS = range(34)
_TRAINED: dict[int, SegClass] = {
    7: SegClass("road", (128, 64, 128)),
    8: SegClass("sidewalk", (244, 35, 232)),
    11: SegClass("building", (70, 70, 70)),
    12: SegClass("wall", (102, 102, 156)),
    13: SegClass("fence", (190, 153, 153)),
    17: SegClass("pole", (153, 153, 153)),
    19: SegClass("traffic light", (250, 170, 30)),
    20: SegClass("traffic sign", (220, 220, 0)),
    21: SegClass("vegetation", (107, 142, 35)),
    22: SegClass("terrain", (152, 251, 152)),
    23: SegClass("sky", (70, 130, 180)),
    24: SegClass("person", (220, 20, 60)),
    25: SegClass("rider", (255, 0, 0)),
    26: SegClass("car", (0, 0, 142)),
    27: SegClass("truck", (0, 0, 70)),
    28: SegClass("bus", (0, 60, 100)),
    31: SegClass("train", (0, 80, 100)),
    32: SegClass("motorcycle", (0, 0, 230)),
    33: SegClass("bicycle", (119, 11, 32)),
}
"""Label id → class; the order is that of the train ids 0 to 18."""
CITYSCAPES_CLASSES = tuple(_TRAINED.values())
TRAIN_IDS = {label: list(_TRAINED).index(label) if label in _TRAINED else IGNORE_LABEL for label in LABEL_IDS}


def open_cityscapes(root: Path, split: str) -> FileDataset:
    """Open one split; the labels of `test` are not public, so all of its pixels are ignored."""
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    for folder, archive in ((images, "leftImg8bit_trainvaltest.zip"), (labels, "gtFine_trainvaltest.zip")):
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist. Unpack {archive} of Cityscapes into {root}.")
    pairs = []
    for image in sorted(images.glob(f"*/[!.]*{IMAGE_END}")):
        stem = image.name.removesuffix(IMAGE_END)
        label = labels / image.parent.name / f"{stem}{LABEL_END}"
        if not label.is_file():
            raise InputError(
                f"{label} does not exist, which labels {image.name}. Masks must be *{LABEL_END} (label ids) of gtFine."
            )
        pairs.append(FilePair(image, label))
    if not pairs:
        raise InputError(
            f"{images} holds no CITY/*{IMAGE_END}. Unpack leftImg8bit_trainvaltest.zip of Cityscapes into {root}."
        )
    return FileDataset(
        pairs, classes=CITYSCAPES_CLASSES, label_values=TRAIN_IDS, spec=f"cityscapes:{root}", split=split
    )
