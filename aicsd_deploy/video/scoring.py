"""Scores of a video whose frames have labels, taken from the very frames that are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import IGNORE_LABEL, SegClass
from aicsd_deploy.metrics import ConfusionMatrix
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.runtime.frames import resize_labels
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.sources import Frame, Source, in_order

if TYPE_CHECKING:
    from typing_extensions import Self


class Scorer(Sink):
    """Scores the labels of each frame against the true ones, at the size of those.

    The flicker rate is the share of pixels that change their class from one frame to the next although their true class
    stays the same, out of all pixels whose true class stays the same; pixels that are ignored in either frame are left out.

    Args:
        labels_of: the true labels of frame number i, uint8 (H, W), 255 where they are ignored.
        count: how many frames have labels; a frame after those is an InputError, and so is one after a frame that could not
            be decoded, since nobody knows whose labels it has.
        class_names: names of the classes.
        max_frames: how many frames are scored at most.
    """

    wants_overlay = False

    def __init__(
        self,
        labels_of: Callable[[int], UInt8Array],
        count: int,
        class_names: list[str],
        *,
        max_frames: int | None = None,
    ) -> None:
        self.name = "the score"
        self._labels_of, self._count, self._names, self._max_frames = labels_of, count, class_names, max_frames
        self._matrix = ConfusionMatrix(len(class_names))
        self._flickered = self._steady = 0
        self._last: tuple[int, UInt8Array, UInt8Array] | None = None

    def open(self, source: Source) -> Self:
        """Get ready.

        Raises:
            InputError: there are fewer labels than `source` says it has frames; since it may be wrong, the message names a way on.
        """
        expected = source.frame_count or 0
        if self._count < min(expected, self._max_frames or expected):
            raise InputError(
                f"{source.name} has {expected} frames, but --labels has only {self._count} label maps, and a video is "
                f"scored frame by frame. Give a label map for each frame, or score the first ones: --max-frames {self._count}"
            )
        self._source = source
        return self

    def write(self, frame: Frame) -> bool:
        assert frame.labels is not None
        if self._source.skipped:
            raise InputError(
                f"{self._source.name} has frames that cannot be decoded, so the labels after them would belong to others. "
                "Score a video that is whole, or end before the damage with --max-frames."
            )
        if frame.index >= self._count:
            raise InputError(
                f"Frame {frame.index} has no labels: there are only {self._count}. A video is scored frame by frame, "
                "so --labels needs as many label maps as it has frames; --max-frames ends it earlier."
            )
        true = self._labels_of(frame.index)
        predicted = resize_labels(frame.labels, (true.shape[0], true.shape[1]))
        self._matrix.add(predicted, true)
        if self._last is not None and self._last[0] == frame.index - 1 and self._last[1].shape == true.shape:
            steady = (true == self._last[1]) & (true != IGNORE_LABEL)
            self._steady += int(steady.sum())
            self._flickered += int((steady & (predicted != self._last[2])).sum())
        self._last = (frame.index, true, predicted)
        return True

    def warn_of_the_rest(self) -> None:
        """Say, once the video has ended, that there are more label maps than it has frames, if there are."""
        frames = self._last[0] + 1 if self._last else 0
        if frames < self._count:
            say(
                f"warning: {self._source.name} has {frames} frames, but --labels has {self._count} label maps. The last "
                f"{self._count - frames} were not used; if frames are missing before the end, the scores are of wrong pairs."
            )

    def result(self) -> dict[str, Any]:
        """Return miou, per_class_iou, pixel_accuracy, mean_class_accuracy, images, label_pixels, and flicker_rate (None for one frame)."""
        scores = self._matrix.scores(self._names).to_dict()
        return scores | {"flicker_rate": self._flickered / self._steady if self._steady else None}


def true_labels(spec: str, split: str, classes: tuple[SegClass, ...]) -> tuple[Callable[[int], UInt8Array], int]:
    """Return the labels of each frame of a video, and how many there are.

    Args:
        spec: a data set whose images are the frames, in order (`camvid:PATH`, `folder:PATH`), or a folder of label maps,
            taken in the order of their names (img2 before img10), where values that no class has are ignored.
        split: "train", "val" or "test", of a data set.
        classes: what the network knows.

    Raises:
        InputError: there is no such data set or folder, or it has other classes than the network.
    """
    if Path(spec).is_dir():
        return _masks_in(Path(spec), len(classes))
    if ":" not in spec and spec != "synthetic":
        raise InputError(
            f"There is no folder {spec} for --labels. Give a folder of label maps, or a data set: camvid:PATH, folder:PATH."
        )
    from aicsd_deploy.data.spec import open_dataset
    from aicsd_deploy.evaluate import check_same_classes

    dataset = open_dataset(spec, split)
    check_same_classes(classes, dataset.classes, spec=spec)
    return lambda index: dataset.load(index)[1], len(dataset)


def _masks_in(folder: Path, num_classes: int) -> tuple[Callable[[int], UInt8Array], int]:
    from aicsd_deploy.data.dataset import read_mask  # here, so that a video without labels needs no Pillow

    paths = in_order(folder, (".png",))
    if not paths:
        raise InputError(f"{folder} holds no label maps (.png). Give the folder that holds one for each frame.")

    def labels_of(index: int) -> UInt8Array:
        labels = read_mask(paths[index])
        return np.where(labels < num_classes, labels, np.uint8(IGNORE_LABEL))

    return labels_of, len(paths)
