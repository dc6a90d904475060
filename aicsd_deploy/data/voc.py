"""PASCAL VOC 2012 in its official layout, alone or with the extra labels of SBD (`trainaug`).

`voc:PATH` holds `VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}`, as torchvision has it.
`vocaug:PATH` is the same with the 10,582 training images that papers use: either `SegmentationClassAug/` lies
in VOC2012, in VOCdevkit or beside it, and `trainaug.txt` with VOC's own lists, or SBD's own
`benchmark_RELEASE/dataset/{cls,train.txt,val.txt}` lies in one of these places (Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011).
"""

from __future__ import annotations

from pathlib import Path

from aicsd_deploy.data.dataset import FileDataset, FilePair
from aicsd_deploy.data.folder import read_stems
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import SegClass

VOC_CLASSES = tuple(
    SegClass(name, color)
    for name, color in {
        "background": (0, 0, 0),
        "aeroplane": (128, 0, 0),
        "bicycle": (0, 128, 0),
        "bird": (128, 128, 0),
        "boat": (0, 0, 128),
        "bottle": (128, 0, 128),
        "bus": (0, 128, 128),
        "car": (128, 128, 128),
        "cat": (64, 0, 0),
        "chair": (192, 0, 0),
        "cow": (64, 128, 0),
        "diningtable": (192, 128, 0),
        "dog": (64, 0, 128),
        "horse": (192, 0, 128),
        "motorbike": (64, 128, 128),
        "person": (192, 128, 128),
        "pottedplant": (0, 64, 0),
        "sheep": (128, 64, 0),
        "sofa": (0, 192, 0),
        "train": (128, 192, 0),
        "tvmonitor": (0, 64, 128),
    }.items()
)
"""The 21 classes in VOC's order, in the colours of its palette; label value 255 is the border, which is ignored."""


def open_voc(root: Path, split: str) -> FileDataset:
    """Open `train` or `val` of VOC 2012."""
    base = _base(root)
    return _dataset(_stems(base, split), base, spec=f"voc:{root}", split=split)


def open_vocaug(root: Path, split: str) -> FileDataset:
    """Open VOC 2012 with SBD: `train` is `trainaug`, `val` is that of VOC."""
    base = _base(root)
    spec = f"vocaug:{root}"
    if split != "train":
        return _dataset(_stems(base, split), base, spec=spec, split=split)
    held_out = set(_stems(base, "val"))
    places = (base, *base.parents[:2])
    labels = next((p / "SegmentationClassAug" for p in places if (p / "SegmentationClassAug").is_dir()), None)
    if labels is not None:
        stems = _stems(base, "trainaug")
        wrong = [stem for stem in stems if stem in held_out]
        if wrong:
            raise InputError(
                f"{base}/ImageSets/Segmentation/trainaug.txt names {len(wrong)} images that are in val.txt too, {wrong[0]} for "
                "one: scores would be of images that were trained on. Take them out of trainaug.txt."
            )
        return _dataset(stems, base, labels={stem: labels / f"{stem}.png" for stem in stems}, spec=spec, split=split)
    releases = (*(p / "benchmark_RELEASE/dataset" for p in places), root / "sbd", root)
    sbd = next((d for d in releases if (d / "cls").is_dir()), None)
    if sbd is None:
        raise InputError(
            f"{root} holds VOC 2012 but no labels of SBD: neither {base / 'SegmentationClassAug'} nor {root / 'benchmark_RELEASE/dataset/cls'} is "
            "there. Put one of them there, or use voc:PATH."
        )
    own = _stems(base, "train")
    what = "images with labels of SBD, without which vocaug is plain voc"
    more = [stem for name in ("train", "val") for stem in _listed(sbd / f"{name}.txt", what)]
    extra = sorted(set(more) - set(own) - held_out)
    files = {stem: sbd / "cls" / f"{stem}.mat" for stem in extra}
    return _dataset([*own, *extra], base, labels=files, spec=spec, split=split)


def _dataset(
    stems: list[str], base: Path, *, spec: str, split: str, labels: dict[str, Path] | None = None
) -> FileDataset:
    pairs = [
        FilePair(
            base / "JPEGImages" / f"{stem}.jpg",
            (labels or {}).get(stem, base / "SegmentationClass" / f"{stem}.png"),
        )
        for stem in stems
    ]
    label_values = {i: i for i in range(len(VOC_CLASSES))}
    return FileDataset(pairs, classes=VOC_CLASSES, label_values=label_values, spec=spec, split=split, as_stored=True)


def _base(root: Path) -> Path:
    for base in (root / "VOCdevkit/VOC2012", root / "VOC2012", root):
        if (base / "JPEGImages").is_dir():
            return base
    raise InputError(
        f"{root} holds no VOCdevkit/VOC2012/JPEGImages. Give the folder that VOCtrainval_11-May-2012.tar was unpacked into."
    )


def _stems(base: Path, split: str) -> list[str]:
    stems = _listed(base / "ImageSets/Segmentation" / f"{split}.txt", f"images of {split}")
    # Some lists have `image label` pairs of paths in a line; the first one names the image.
    return [Path(stem.split()[0]).stem for stem in stems]


def _listed(path: Path, what: str) -> list[str]:
    stems = read_stems(path)
    if not stems:
        problem = "does not exist" if stems is None else "names no image"
        raise InputError(f"{path} {problem}, but it is to list the {what}. Put the official list there.")
    return stems
