"""Labels for other programs: a PNG per frame, or a line of JSON per frame."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import atomic_path, check_writable, write_png, write_text
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.video.sinks import Sink, keep_partial, require_room
from aicsd_deploy.video.sources import Frame, Source

if TYPE_CHECKING:
    from typing_extensions import Self


SPARE_BYTES = 1 << 16
"""Room on the disk that a label map leaves, besides that for times.txt."""


class PngSink(Sink):
    """A folder with frame_000000.png, … (8-bit grey, the value is the class index), classes.txt and times.txt.

    classes.txt has a line `index name R G B` per class, times.txt one per frame with its time in seconds and, where it came
    from a folder, the name of the picture. A folder that holds something is refused, so that two runs cannot be mixed.

    Raises:
        InputError: the path is a file, or a folder that is not empty.
    """

    wants_overlay = False

    def __init__(self, folder: Path, classes: Sequence[SegClass]) -> None:
        self.folder, self.name = folder, str(folder)
        self._classes = classes
        if folder.is_file():
            raise InputError(f"Cannot write label maps into {folder}: it is a file. Name a new folder.")
        if folder.is_dir() and next(folder.iterdir(), None) is not None:
            raise InputError(f"Cannot write label maps into {folder}: it is not empty. Name a new folder, or empty it.")

    def open(self, source: Source) -> Self:
        """Get ready; the folder is made for the first frame.

        Raises:
            InputError: it cannot be written to.
        """
        check_writable(self.folder / "times.txt")
        self._times: list[str] = []
        self._spare_bytes = SPARE_BYTES
        return self

    def write(self, frame: Frame) -> bool:
        assert frame.labels is not None
        # Without times.txt, nobody would know what the label maps belong to.
        require_room(self.folder, self._spare_bytes)
        write_png(self.folder / f"frame_{frame.index:06d}.png", frame.labels)
        if not self._times:  # not before: where the disk is full, no folder stays
            lines = (f"{i} {c.name} {' '.join(map(str, c.color_rgb))}\n" for i, c in enumerate(self._classes))
            write_text(self.folder / "classes.txt", "".join(lines))
        picture = "" if frame.picture is None else f" {frame.picture}"
        self._times.append(f"frame_{frame.index:06d}.png {frame.time_s:.6f}{picture}\n")
        self._spare_bytes += 4 * len(self._times[-1])  # a letter of a name takes up to four bytes
        return True

    def close(self, error: BaseException | None) -> None:
        if self._times:
            write_text(self.folder / "times.txt", "".join(self._times))
            if error is not None and not isinstance(error, KeyboardInterrupt):
                say(f"The frames until the error are kept in {self.folder}")


class RleSink(Sink):
    """A file with a line of JSON per frame: its number, time, picture (of a folder), size and, per class in it, the pixels as
    run lengths.

    The run lengths are COCO's uncompressed ones: column by column, the number of pixels outside, inside, outside, … the
    class, so that pycocotools.mask.frPyObjects reads `{"size": …, "counts": …}`. If the work fails midway, the lines until
    then are kept as NAME.partial.jsonl.
    """

    wants_overlay = False

    def __init__(self, path: Path, classes: Sequence[SegClass]) -> None:
        self.path, self.name = path, str(path)
        self._names = [c.name for c in classes]

    def open(self, source: Source) -> Self:
        """Start the file.

        Raises:
            InputError: it cannot be written.
        """
        with ExitStack() as opened:
            self._temporary = opened.enter_context(atomic_path(self.path))
            self._file = opened.enter_context(self._temporary.open("wb"))
            self._opened = opened.pop_all()
        self._whole_bytes = 0
        return self

    def write(self, frame: Frame) -> bool:
        assert frame.labels is not None
        line: dict[str, Any] = {"frame": frame.index, "time_s": round(frame.time_s, 6)}
        line |= {} if frame.picture is None else {"picture": frame.picture}
        line |= run_lengths(frame.labels, self._names)
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        self._whole_bytes = self._file.tell()
        return True

    def close(self, error: BaseException | None) -> None:
        if isinstance(error, KeyboardInterrupt):  # the user ends it
            error = None
        unfinished = error or (None if self._whole_bytes else InputError("no frame was written"))
        if error is not None and self._whole_bytes:
            with suppress(OSError):  # what is left of a line that the disk had no room for
                self._file.close()
            os.truncate(self._temporary, self._whole_bytes)
            keep_partial(self._temporary, self.path)
        self._opened.__exit__(type(unfinished) if unfinished else None, unfinished, None)


def run_lengths(labels: UInt8Array, names: Sequence[str]) -> dict[str, Any]:
    """Return the size and, for each class that occurs, the run lengths of its pixels.

    Args:
        labels: uint8 (H, W).
        names: names of the classes, in the order of the label values; other values are left out.
    """
    column_by_column = labels.ravel(order="F")
    starts = np.concatenate(([0], np.flatnonzero(np.diff(column_by_column)) + 1, [labels.size]))
    values, begins, ends = column_by_column[starts[:-1]], starts[:-1], starts[1:]
    counts: dict[str, list[int]] = {}
    for value in np.unique(values):
        if value >= len(names):
            continue
        inside = values == value
        edges = np.stack([begins[inside], ends[inside]], axis=1).ravel()
        counts[names[value]] = np.diff(np.concatenate(([0], edges, [labels.size]))).tolist()
    return {
        "size": list(labels.shape),
        "classes": {name: c if sum(c[-1:]) else c[:-1] for name, c in counts.items()},
    }
