"""Labelled images, wherever they come from: one interface, one checked way to read files, one cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile

from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import IGNORE_LABEL, SegClass
from aicsd_deploy.runtime.base import UInt8Array

RGB = tuple[int, int, int]
LabelledImage = tuple[UInt8Array, UInt8Array]
"""A picture, uint8 (H, W, 3) in red, green, blue (from `load_bgr` the other way round), and its labels, uint8 (H, W): class
indices, 255 where ignored."""
_ADD_OR_LEAVE_OUT = "Add it, or take its line out of the split's list."


class SegmentationDataset(ABC):
    """Labelled images of one split.

    Attributes:
        classes: the classes, in the order of the label values that `load` gives.
        spec: how a user names this data set, for example "camvid:/data/camvid".
        split: "train", "val" or "test".
    """

    classes: tuple[SegClass, ...]
    spec: str
    split: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return a short name of one image, for messages and pictures."""

    @abstractmethod
    def load(self, index: int) -> LabelledImage:
        """Read one image and its labels.

        Raises:
            InputError: a file is missing, damaged, of another size, or holds a label value that no class has.
        """

    def load_bgr(self, index: int) -> LabelledImage:
        """Read one image, blue, green, red, as OpenCV gives frames, and its labels; see `load`."""
        image_rgb, labels = self.load(index)
        return np.ascontiguousarray(image_rgb[..., ::-1]), labels

    def is_grey(self, index: int) -> bool:
        """Say whether the picture has one channel only, by the head of its file."""
        return False


@dataclass(frozen=True)
class FilePair:
    """An image file and the file with its labels."""

    image: Path
    labels: Path


class FileDataset(SegmentationDataset):
    """Images and index masks in files."""

    def __init__(
        self,
        pairs: Sequence[FilePair],
        *,
        classes: tuple[SegClass, ...],
        label_values: Mapping[int, int],
        spec: str,
        split: str,
        colors: Mapping[RGB, int | None] | None = None,
        as_stored: bool = False,
    ) -> None:
        """Keep the list of files; nothing is read yet.

        Args:
            pairs: the files, in order.
            classes: the classes in the order of their indices.
            label_values: value in the mask → class index, or 255 where it is to be ignored.
            spec: see `SegmentationDataset`.
            split: see `SegmentationDataset`.
            colors: see `read_mask`.
            as_stored: see `read_image`.
        """
        self._colors, self._as_stored = colors, as_stored
        self.pairs = list(pairs)
        self.classes = classes
        self.spec = spec
        self.split = split
        self._known_values = sorted(label_values)
        self._to_index = np.full(256, IGNORE_LABEL, dtype=np.uint8)
        self._is_known = np.zeros(256, dtype=bool)
        for value, index in {IGNORE_LABEL: IGNORE_LABEL, **label_values}.items():
            self._to_index[value] = index
            self._is_known[value] = True

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].image.stem

    def load(self, index: int) -> LabelledImage:
        pair = self.pairs[index]
        image = read_image(pair.image, as_stored=self._as_stored)
        values = read_mask(pair.labels, colors=self._colors, known=self._is_known)
        if values.shape != image.shape[:2]:
            raise InputError(
                f"{pair.labels} is {values.shape[0]}x{values.shape[1]} (HxW) but its image {pair.image.name} is "
                f"{image.shape[0]}x{image.shape[1]}. Labels must have the size of their image: take the image that they "
                "were drawn on, or scale the mask without smoothing (nearest neighbour)."
            )
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        unknown = present[~self._is_known[present]]
        if unknown.size:
            raise InputError(
                f"{pair.labels} holds label value{'s' if unknown.size > 1 else ''} {', '.join(map(str, unknown))}, which no "
                f"class has (known: {', '.join(map(str, self._known_values))}; 255 is ignored). Correct the mask or the class list."
            )
        return image, self._to_index[values]

    def is_grey(self, index: int) -> bool:
        with _opened(self.pairs[index].image, "image") as picture:
            return len(picture.getbands()) == 1 and picture.mode != "P"


class Subset(SegmentationDataset):
    """Some images of a data set."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.classes, self.spec, self.split = dataset.classes, dataset.spec, dataset.split
        self._dataset, self._indices = dataset, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._dataset.name(self._indices[index])

    def load(self, index: int) -> LabelledImage:
        return self._dataset.load(self._indices[index])


class CachedDataset(SegmentationDataset):
    """Keeps what it has once loaded in memory, up to a limit; past it, images are read anew each time. Threads may share it."""

    _lock = Lock()  # of the class, since a data set is pickled where workers cannot be forked

    def __init__(self, dataset: SegmentationDataset, *, limit_bytes: int = 2 * 2**30) -> None:
        self.dataset = dataset
        self.classes, self.spec, self.split = dataset.classes, dataset.spec, dataset.split
        self._kept: dict[int, LabelledImage] = {}
        self._limit_bytes = limit_bytes
        self.kept_bytes = 0

    @property
    def kept_images(self) -> int:
        return len(self._kept)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def is_grey(self, index: int) -> bool:
        return self.dataset.is_grey(index)

    def load(self, index: int) -> LabelledImage:
        pair = self._kept.get(index)
        if pair is None:
            pair = self.dataset.load(index)
            size = pair[0].nbytes + pair[1].nbytes
            with self._lock:
                if index not in self._kept and self.kept_bytes + size <= self._limit_bytes:
                    self.kept_bytes += size
                    self._kept[index] = pair
        return pair


def evenly_spread(length: int, count: int) -> list[int]:
    """Return `count` indices, or all where there are fewer, from the first of `length` to the last."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length))})


def read_image(path: Path, *, as_stored: bool = False) -> UInt8Array:
    """Read a picture as uint8 (H, W, 3), red, green, blue; grey ones become colour.

    Args:
        path: the picture.
        as_stored: labels are known to be drawn on the pixels as they are stored, whatever an EXIF tag says of turning them.

    Raises:
        InputError: the file is missing, no picture, damaged, has more than 8 bits a channel, or is turned by its EXIF tag.
    """
    with _opened(path, "image") as picture:
        if _is_deep(picture):
            raise InputError(
                f"{path} has more than 8 bits a channel (mode {picture.mode}), but pictures must have 8, as frames do. "
                "Bring it to 0 to 255 first, in the way that your camera's frames will be brought to it."
            )
        if not as_stored:
            _refuse_turned(picture, path)
        return np.asarray(picture.convert("RGB"))


def read_mask(
    path: Path, *, colors: Mapping[RGB, int | None] | None = None, known: npt.NDArray[np.bool_] | None = None
) -> UInt8Array:
    """Read a mask as uint8 (H, W): an index mask, a palette picture, a colour picture, or a file of SBD.

    The indices of a palette picture count, except where its palette is that of the classes in another order, or holds the
    label values as greys.

    Args:
        path: a picture, or a .mat file in the form of SBD's `cls` folder.
        colors: colour → value in the mask, or None where several values have it; None instead takes no colour pictures.
        known: bool (256), which label values there are; None leaves greys in a palette alone.

    Raises:
        InputError: the file is missing, no picture, damaged, a JPEG, turned by its EXIF tag, or of colours that stand for
            nothing.
    """
    if path.suffix == ".mat":
        return _read_sbd(path)
    with _opened(path, "label") as picture:
        if picture.format in ("JPEG", "MPO"):  # MPO: a JPEG with a preview, as phones write it
            raise InputError(
                f"{path} is a JPEG. That format changes values where two classes meet, so that labels are wrong there. Make the "
                "masks anew as PNG, from what they were drawn with; converting the file keeps the damage."
            )
        widened = _widened(picture)
        _refuse_turned(picture, path)
        if picture.mode in ("RGB", "RGBA") and colors is not None:
            return _from_colors(np.asarray(picture.convert("RGB")), colors, path)
        if picture.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
            colored = "" if colors is None else ", or red, green and blue in the colours of the classes"
            raise InputError(
                f"{path} is a picture of mode {picture.mode}. Labels must be index masks: one channel of whole numbers, which are "
                f"class indices{colored}. Convert it first."
            )
        values = np.asarray(picture)
        if values.size and (values.max() > 255 or values.min() < 0):
            raise InputError(f"{path} holds label values {values.min()} to {values.max()}; they must lie in 0 to 255.")
        values = values.astype(np.uint8) // widened
        palette = picture.getpalette() if picture.mode == "P" else None
        if palette and known is not None and _holds_values(palette, values, known):
            return np.asarray(np.array(palette[::3], dtype=np.uint8)[values])
        return values if colors is None or not palette else _from_palette(values, palette, colors, path)


def _holds_values(palette: Sequence[int], values_HW: UInt8Array, known: npt.NDArray[np.bool_]) -> bool:
    """Say whether a palette holds the label values as greys: programs that make PNG files smaller (oxipng) write masks so.

    One of black and white alone is there to be looked at, and its indices count.
    """
    used, greys = np.unique(values_HW), palette[::3]
    if not greys == palette[1::3] == palette[2::3] or used[-1] >= len(greys):
        return False
    found = np.array(greys)[used]
    return bool(known[found].all()) and not np.isin(found, (0, 255)).all()


def _from_palette(
    values_HW: UInt8Array, palette: Sequence[int], colors: Mapping[RGB, int | None], path: Path
) -> UInt8Array:
    """Return the values as they are, or what their colours stand for, where the palette holds class colours in another order.

    Programs that reduce colours number a palette as they like. One with other colours, or with one of them twice, says
    nothing about classes.
    """
    entries = [(palette[i], palette[i + 1], palette[i + 2]) for i in range(0, len(palette), 3)]
    used = int(values_HW.max(initial=0, where=values_HW != IGNORE_LABEL)) + 1  # 255 is ignored, whatever its colour
    filler = entries[-1]
    while len(entries) > used and entries[-1] == filler:
        entries.pop()
    if used > len(entries) or len(set(entries)) < len(entries) or not colors.keys() >= set(entries):
        return values_HW
    if all(colors[color] in (value, None) for value, color in enumerate(entries)):
        return values_HW
    table = np.full(256, IGNORE_LABEL, dtype=np.uint8)
    values_of = _unambiguous(colors, path)
    table[: len(entries)] = [values_of[color] for color in entries]
    return table[values_HW]


def _from_colors(picture_HWC: UInt8Array, colors: Mapping[RGB, int | None], path: Path) -> UInt8Array:
    values_of = _unambiguous(colors, path)
    packed = picture_HWC.astype(np.int64) @ np.array([65536, 256, 1])
    found, where = np.unique(packed, return_inverse=True)
    triples = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in found]
    unknown = [color for color in triples if color not in values_of]
    if unknown and all(red == green == blue for red, green, blue in triples):
        raise InputError(
            f"{path} has three channels that are all the same, such as {unknown[0]}, which is no class's colour. If its values are "
            "the class indices, keep one channel (Pillow: Image.open(path).getchannel(0).save(path))."
        )
    if unknown:
        raise InputError(
            f"{path} is a colour picture with {len(unknown)} colour{'s' if len(unknown) > 1 else ''} that no class has, such as "
            f"{unknown[0]}. If it was saved as JPEG or resized smoothly, make it anew without: colours between two classes mean "
            "nothing. Else correct the colours in the class list."
        )
    values = np.array([values_of[color] for color in triples], dtype=np.uint8)
    return np.asarray(values[where].reshape(packed.shape))


def _unambiguous(colors: Mapping[RGB, int | None], path: Path) -> dict[RGB, int]:
    for color, value in colors.items():
        if value is None:
            raise InputError(
                f"classes.txt gives the colour {color} to two classes, but the labels in {path} are colours, so that it cannot "
                "be told which class is meant. Give each class its own colour, in both."
            )
    return {color: value for color, value in colors.items() if value is not None}


def _read_sbd(path: Path) -> UInt8Array:
    from scipy.io import loadmat

    if not path.is_file():
        raise InputError(f"The label file {path} does not exist. {_ADD_OR_LEAVE_OUT}")
    try:
        values = loadmat(path, squeeze_me=True)["GTcls"]["Segmentation"].item()
        return np.ascontiguousarray(values, dtype=np.uint8)  # MATLAB's order is column by column, which OpenCV refuses
    except Exception as error:  # whatever a damaged file makes of the reader
        raise InputError(
            f"{path} is no label file of SBD (a .mat with GTcls.Segmentation), or is damaged. Copy it anew."
        ) from error


def _is_deep(picture: ImageFile.ImageFile) -> bool:
    """Say whether a channel has more than 8 bits. Only before the pixels are loaded: of 16-bit colour, Pillow then has 8 left."""
    tiff_bits: tuple[int, ...] = getattr(picture, "tag_v2", {}).get(258, (8,))
    png_is_deep = picture.format == "PNG" and ";16" in str(picture.tile)
    return picture.mode.startswith(("I", "F")) or png_is_deep or max(tiff_bits) > 8


def _widened(picture: ImageFile.ImageFile) -> int:
    """Return by what Pillow multiplies the greys of a PNG of 2 or 4 bits, to make white of the largest. Only before they are loaded."""
    tile = str(picture.tile) if picture.format == "PNG" else ""
    return 85 if "'L;2'" in tile else 17 if "'L;4'" in tile else 1


def _refuse_turned(picture: ImageFile.ImageFile, path: Path) -> None:
    """Load the pixels and raise InputError if viewers show them turned."""
    if picture.format != "TIFF":  # of which Pillow turns the pixels as it loads them, and drops the tag
        picture.load()
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, which viewers pass over too
        orientation = None
    if orientation in range(2, 9):
        raise InputError(
            f"{path} is turned by its EXIF tag (orientation {orientation}). Viewers show it otherwise than it is stored, and "
            "labels are drawn on either, which cannot be told. If on the shown one, turn the pixels (exiftran -ai FILE, or "
            "mogrify -auto-orient FILE); if on the stored one, remove the tag (exiftool -Orientation= FILE)."
        )


@contextmanager
def _opened(path: Path, what: str) -> Iterator[ImageFile.ImageFile]:
    """Open a picture, of which only the head is read; damage is an InputError here and while its pixels are loaded."""
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError as error:
        raise InputError(f"The {what} file {path} does not exist. {_ADD_OR_LEAVE_OUT}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise InputError(
            f"The {what} file {path} ({size} bytes) is no picture that can be read, or is damaged: {error}. Copy or make "
            "it anew."
        ) from error
