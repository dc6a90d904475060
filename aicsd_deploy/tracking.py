"""What a run leaves for people: metrics.jsonl, TensorBoard events, curves, the confusion matrix and a page of overlays."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from aicsd_deploy.console import say
from aicsd_deploy.data.dataset import SegmentationDataset, evenly_spread
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import DISK_FULL, atomic_path, write_png
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import segment
from aicsd_deploy.video.overlay import Overlay, legend_panel

METRICS = "metrics.jsonl"


class RunLog:
    """Writes every figure of a run twice: a line of metrics.jsonl for programs, TensorBoard events for people."""

    def __init__(self, folder: Path, *, keep_bytes: int, step: int) -> None:
        """Go on with the log of a run as it was when its state was saved.

        Args:
            folder: the run folder.
            keep_bytes: what `written_bytes` was then; what a run that was killed wrote after it is dropped.
            step: the step that was saved.

        Raises:
            InputError: another process writes this log, such as one that a scheduler has not ended yet.
        """
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS).open("ab")
        self._lock(folder)
        if self.written_bytes() < keep_bytes:
            say(f"warning: {folder / METRICS} has lost lines since its run was saved; it goes on from what is there.")
        else:
            self._file.truncate(keep_bytes)
        self._hook, threading.excepthook = threading.excepthook, self._report_thread
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
        except BlockingIOError:
            raise InputError(
                f"Another process is training in {folder}, and each would overwrite what the other saves. Wait for it or stop it, "
                "or give another --out."
            ) from None
        except OSError:  # a file system without locks
            return

    def write(self, step: int, **values: Any) -> None:
        """Write one line: `step` and `values`, numbers or dictionaries of numbers; what is no number becomes null."""
        self._file.write(json.dumps(_with_nulls({"step": step, **values}), allow_nan=False).encode() + b"\n")
        self._file.flush()
        for name, value in values.items():
            items = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, number in items.items():
                if isinstance(number, int | float):
                    self._board.add_scalar(key, number, step)

    def written_bytes(self) -> int:
        """Return the length of metrics.jsonl, all of which is on the disk then."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which has been said by then
            self._file.close()
            self._board.close()
        threading.excepthook = self._hook

    def _report_thread(self, args: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread, but not of TensorBoard's on a full disk: the next line of the log raises that error."""
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_FULL):
            self._hook(args)


def _with_nulls(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _with_nulls(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    path = folder / METRICS
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def plot_curves(folder: Path) -> None:
    """Draw loss terms, gradient norms, α and validation mIoU over the steps into curves.png."""
    plt = pyplot()
    lines = read_log(folder)
    steps = [line for line in lines if "terms" in line]
    mark = "." if len(steps) < 30 else ""  # a line of one point is not to be seen
    scored = [line for line in lines if "val" in line]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    for axis, key, title in (
        (axes[0], "terms", "loss terms, before weighting"),
        (axes[1], "gradient_norm", "gradient norm of the weighted terms"),
    ):
        for name in steps[0][key] if steps else []:
            values = [line[key][name] for line in steps]
            axis.plot([line["step"] for line in steps], values, f"{mark}-", label=name, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.set_yscale("log", nonpositive="mask")  # a term whose weight is 0, as ALW's first, has no place on it
        if steps:
            axis.legend()
    axes[2].plot(
        [line["step"] for line in scored], [100 * line["val"]["miou"] for line in scored], "o-", label="val mIoU, %"
    )
    if steps and steps[0].get("alpha") is not None:
        axes[2].plot(
            [line["step"] for line in steps],
            [100 * line["alpha"] for line in steps],
            f"{mark}:",
            color="grey",
            label="100 α (ALW)",
        )
    axes[2].set(title="validation", xlabel="step", ylim=(0, 100))
    axes[2].legend()
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # there is no step 4.8
    save_figure(figure, folder / "curves.png")


def plot_confusion(counts: npt.NDArray[np.int64], classes: tuple[SegClass, ...], path: Path) -> None:
    """Draw a confusion matrix, each row as shares of its true class."""
    plt = pyplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.42 * len(classes)
    figure, axis = plt.subplots(figsize=(side + 0.6, side), constrained_layout=True)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [c.name for c in classes]
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted", ylabel="true", title="share of each true class, %")
    if len(names) <= 34:
        for row, column in np.ndindex(share.shape):
            if share[row, column] >= 0.005:
                color = "white" if share[row, column] > 0.5 else "black"
                axis.text(
                    column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color
                )
    save_figure(figure, path)


def draw_overlays(
    backends: Mapping[str, Backend], dataset: SegmentationDataset, path: Path, *, width: int = 400, count: int = 6
) -> None:
    """Draw a page of images, evenly spread over a data set: frame, truth, then what each backend makes of it, by its title.

    Each is drawn on `width` pixels.
    """
    overlay = Overlay(dataset.classes, opacity=0.7, legend=False)
    rows: list[UInt8Array] = []
    for index in evenly_spread(len(dataset), count):
        frame, labels = dataset.load_bgr(index)
        tiles = {"frame": frame, "truth": overlay.draw(frame.copy(), labels)}
        tiles |= {title: overlay.draw(frame.copy(), segment(backend, frame)) for title, backend in backends.items()}
        rows.append(picture_row(tiles, width=width, titled=not rows))
    write_png(path, picture_page(rows, dataset.classes))


def picture_row(pictures: dict[str, UInt8Array], *, width: int, titled: bool) -> UInt8Array:
    """Return pictures of one size side by side, each on `width` pixels; `titled` writes their names into them."""
    tiles = []
    for title, picture in pictures.items():
        height = max(1, round(width * picture.shape[0] / picture.shape[1]))
        tile = cv2.resize(picture, (width - 4, height), interpolation=cv2.INTER_AREA)
        if titled:
            font, room = cv2.FONT_HERSHEY_SIMPLEX, width - 20  # pixels
            scale = 0.7 * min(1.0, room / cv2.getTextSize(title, font, 0.7, 2)[0][0])
            cv2.putText(tile, title, (8, 24), font, scale, (0, 0, 0), 4, cv2.LINE_AA)
            cv2.putText(tile, title, (8, 24), font, scale, (255, 255, 255), 2, cv2.LINE_AA)
        tiles.append(cv2.copyMakeBorder(tile, 0, 4, 0, 4, cv2.BORDER_CONSTANT))
    return np.asarray(np.hstack(tiles), dtype=np.uint8)


def picture_page(rows: Sequence[UInt8Array], classes: tuple[SegClass, ...]) -> UInt8Array:
    """Return rows of pictures, one below the other, and below them which colour is which class."""
    width = rows[0].shape[1]
    legend = legend_panel(classes, (540, width))  # letters as on a frame of 540 rows: 15 pixels
    return np.asarray(np.vstack([*rows, legend]), dtype=np.uint8)


def pyplot() -> Any:
    """Return matplotlib.pyplot, drawing into files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure atomically and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot().close(figure)
    return path
