"""Your own images and masks.

`folder:PATH` holds `{train,val}/images/`, `{train,val}/labels/` and `classes.txt` with lines `index name R G B`; a
`train.txt` or `val.txt` with file stems, where there is one, says which images belong to the split and in which order. With
such lists, all may lie together in `images/` and `labels/`. Masks hold the indices, or the colours, of `classes.txt`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from aicsd_deploy.console import say
from aicsd_deploy.data.dataset import RGB, FileDataset, FilePair
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import existing_file
from aicsd_deploy.metadata import IGNORE_LABEL, SegClass

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
IGNORED_NAMES = ("ignore", "ignored", "void", "unlabelled", "unlabeled")
"""A line of classes.txt with one of these names gives a label value that is left out, not a class."""


def open_folder(root: Path, split: str) -> FileDataset:
    """Open one split of `folder:ROOT`; see the module's text for the layout."""
    classes, label_values, colors = read_classes(root / "classes.txt")
    stems = read_stems(root / f"{split}.txt")
    base = root if stems is not None and not (root / split).is_dir() and (root / "images").is_dir() else root / split
    return FileDataset(
        pair_up(base / "images", base / "labels", stems=stems),
        classes=classes,
        label_values=label_values,
        spec=f"folder:{root}",
        split=split,
        colors=colors,
    )


def read_classes(path: Path) -> tuple[tuple[SegClass, ...], dict[int, int], dict[RGB, int | None]]:
    """Read classes.txt.

    Returns:
        The classes in the order of their label values, the table from label value to class index (255: ignored), and that
        from colour to label value (None: two lines have this colour).

    Raises:
        InputError: the file is missing, a line is not `index name R G B`, a class has the value 255, or two have one name.
    """
    if not path.exists():
        raise InputError(
            f"{path} does not exist, which tells what the values in the masks mean. Write a line for each class: the value, the "
            "name, and red, green, blue for pictures, for example: 0 road 128 64 128"
        )
    existing_file(path, "The class list")
    found: dict[int, SegClass] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            value, *name, red, green, blue = line.split()
            color = (int(red), int(green), int(blue))
            if not name or int(value) in found or not all(0 <= v <= 255 for v in (int(value), *color)):
                raise ValueError
            found[int(value)] = SegClass(" ".join(name), color)
        except ValueError:
            raise InputError(
                f"{path}, line {number}: {line.strip()!r} is not `index name R G B` with an index used once and numbers from "
                "0 to 255, for example: 0 road 128 64 128"
            ) from None
    reserved = found.get(IGNORE_LABEL)
    if reserved is not None and reserved.name.lower() not in IGNORED_NAMES:
        raise InputError(
            f"{path} gives the value 255 to the class {reserved.name!r}, but pixels of 255 are ignored. Give the class another "
            "value, in the masks too, or name it void if it is to be ignored."
        )
    kept = [value for value in sorted(found) if found[value].name.lower() not in IGNORED_NAMES]
    if len(kept) < 2:
        raise InputError(
            f"{path} names {len(kept)} class{'' if len(kept) == 1 else 'es'}, but there must be two to tell apart. Add the others, such "
            "as the background, or name none of them void."
        )
    names = Counter(found[value].name for value in kept)
    shared = next((name for name in names if names[name] > 1), None)
    if shared is not None:
        raise InputError(
            f"{path} has {names[shared]} classes named {shared!r}, which scores by name would mix up. Give each its own name."
        )
    colors: dict[RGB, int | None] = {}
    for label_value, seg_class in found.items():
        colors[seg_class.color_rgb] = None if seg_class.color_rgb in colors else label_value
    table = {v: kept.index(v) if v in kept else IGNORE_LABEL for v in found}
    return tuple(found[value] for value in kept), table, colors


def read_stems(path: Path) -> list[str] | None:
    """Return the file stems that a split list names, one in a line; None where there is no such list.

    Raises:
        InputError: it names one twice, which training or a score would count twice.
    """
    if not path.is_file():
        return None
    lines = [line.strip() for line in _lines(path) if line.strip()]
    stems = [Path(line).stem if Path(line).suffix.lower() in IMAGE_SUFFIXES else line for line in lines]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise InputError(f"{path} names {len(twice)} images twice, {twice[0]!r} for one. Leave each once.")
    return stems


def _lines(path: Path) -> list[str]:
    try:
        # -sig: Windows' editors begin a file with a mark (BOM), which would become a part of the first line.
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no text in UTF-8 ({error.reason}), so names in it cannot be read. Save it as UTF-8."
        ) from error


def pair_up(images: Path, labels: Path, *, stems: list[str] | None = None, label_end: str = "") -> list[FilePair]:
    """Match the images and the masks of two folders by their file stems.

    Args:
        images, labels: the folders.
        stems: which images, in which order; None takes all.
        label_end: what the stem of a mask may have at its end besides.

    Raises:
        InputError: a folder is missing, holds no pictures or two of one stem, or an image or a mask is missing.
    """
    image_files, label_files = _by_stem(images, "images"), _by_stem(labels, "labels", end=label_end)
    chosen = sorted(image_files) if stems is None else stems
    if not chosen:
        raise InputError(f"The split list beside {images.parent} names no image. Fill it, or remove it to take all.")
    unknown = [stem for stem in chosen if stem not in image_files]
    if unknown:
        raise InputError(
            f"{images} lacks {len(unknown)} of the {len(chosen)} images that the split's list names, {unknown[0]!r} for one. Add "
            "them, or take their lines out of the list."
        )
    unlabelled = [image_files[stem].name for stem in chosen if stem not in label_files]
    if unlabelled:
        raise InputError(
            f"{labels} lacks the masks of {len(unlabelled)} of the {len(chosen)} images in {images}, {unlabelled[0]} for one. Add "
            "them, or take those images away (or out of the split's list)."
        )
    alone = sorted(label_files.keys() - image_files.keys())
    if alone and stems is None:
        say(
            f"{len(alone)} of the masks in {labels} have no image and are left out, {label_files[alone[0]].name} for one."
        )
    return [FilePair(image_files[stem], label_files[stem]) for stem in chosen]


def _by_stem(folder: Path, what: str, *, end: str = "") -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist, where the {what} of this split are expected. README shows the layouts under 'Data'."
        )
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):  # macOS leaves ._NAME beside NAME
            continue
        stem = path.stem.removesuffix(end)
        if stem in files:
            raise InputError(
                f"{folder} holds both {files[stem].name} and {path.name}, but images and labels are matched by the name "
                "without its suffix. Remove or rename one of them."
            )
        files[stem] = path
    if not files:
        raise InputError(
            f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}; folders inside it are not looked into). Put the {what} of "
            "this split there."
        )
    return files
