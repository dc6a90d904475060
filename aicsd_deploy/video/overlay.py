"""Labels as colours over the frame, a legend of the classes in sight, and a line of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.runtime.base import UInt8Array

SEEN_FRACTION = 0.002
"""A class is in sight if it covers this part of the picture ..."""
SEEN_FRAMES = 50
"""... and stays in the legend for this many frames after, so that the legend does not flicker."""

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK = (245, 245, 245)
_PAPER = (24, 24, 24)


class Overlay:
    """Draws on frames; it keeps its buffers from frame to frame, so one thread at a time may use it.

    Args:
        classes: names and colours in the order of the label values. Other values, 255 among them, get no colour.
        opacity: 0 shows only the frame, 1 only the colours.
        legend: show the names of the classes that are in sight, and the figures.
        shown: names of the classes to show; None shows all.
        contour: draw only the borders of the classes, as lines.

    Raises:
        InputError: `shown` names a class that there is not.
    """

    def __init__(
        self,
        classes: Sequence[SegClass],
        *,
        opacity: float = 0.55,
        legend: bool = True,
        shown: Sequence[str] | None = None,
        contour: bool = False,
    ) -> None:
        self.classes, self.opacity, self.legend, self.contour = tuple(classes), opacity, legend, contour
        names = [c.name for c in self.classes]
        if unknown := [name for name in shown or () if name not in names]:
            raise InputError(f"The network has no class {unknown[0]!r}. It has: {', '.join(names)}.")
        self.shown = tuple(i for i, name in enumerate(names) if shown is None or name in shown)
        self._palette_bgr = np.zeros((256, 1, 3), np.uint8)
        self._palette_bgr[: len(self.classes), 0] = [c.color_rgb[::-1] for c in self.classes]
        self._hidden = np.full(256, 255, np.uint8)  # 255 where a label value gets no colour
        self._hidden[list(self.shown)] = 0
        self._colors = np.empty((0, 0, 3), np.uint8)
        self._mask = np.empty((0, 0), np.uint8)
        self._last_seen: dict[int, int] = {}
        self._frames = 0

    def draw(self, image_bgr: UInt8Array, labels: UInt8Array, *, hud: str = "") -> UInt8Array:
        """Blend the label colours over a frame, in place, then draw the legend and the `hud` text if there is one.

        Args:
            image_bgr: uint8 (H, W, 3), contiguous; it is drawn on.
            labels: uint8 (H, W).
            hud: a line of ASCII text for the upper left corner.

        Returns:
            `image_bgr`.
        """
        self.blend(image_bgr, labels)
        if self.legend:
            self._note_classes(labels)
            panel = legend_panel(tuple(self.classes[i] for i in sorted(self._last_seen)), image_bgr.shape[:2])
            _paste(image_bgr, panel, at_bottom=True)
        if self.legend and hud:
            _paste(image_bgr, text_panel(hud, image_bgr.shape[:2]), at_bottom=False)
        return image_bgr

    def blend(self, image_bgr: UInt8Array, labels: UInt8Array) -> None:
        """Blend only the colours, in place; pixels whose label has no class to show keep their value."""
        if self._colors.shape != image_bgr.shape:
            self._colors, self._mask = np.empty_like(image_bgr, order="C"), np.empty_like(labels, order="C")
        cv2.applyColorMap(labels, self._palette_bgr, self._colors)  # six times as fast as palette[labels]
        cv2.LUT(labels, self._hidden, self._mask)
        if self.contour:
            cv2.bitwise_or(self._mask, _inside(labels, text_height_px(image_bgr.shape[:2]) // 4), dst=self._mask)
        if cv2.countNonZero(self._mask):
            cv2.copyTo(image_bgr, self._mask, self._colors)
        cv2.addWeighted(self._colors, self.opacity, image_bgr, 1 - self.opacity, 0, dst=image_bgr)

    def _note_classes(self, labels: UInt8Array) -> None:
        sample = labels[::4, ::4]
        counts = np.bincount(sample.ravel(), minlength=256)
        for index in self.shown:
            if counts[index] > SEEN_FRACTION * sample.size:
                self._last_seen[index] = self._frames
        self._last_seen = {i: seen for i, seen in self._last_seen.items() if self._frames - seen <= SEEN_FRAMES}
        self._frames += 1


def _inside(labels: UInt8Array, width_px: int) -> UInt8Array:
    """Return 255 where all pixels within half of `width_px` have the same label, 0 along the borders."""
    side = max(3, width_px | 1)  # odd, so that the line lies in the middle
    window = np.ones((side, side), np.uint8)
    same = cv2.compare(cv2.erode(labels, window), cv2.dilate(labels, window), cv2.CMP_EQ)
    return np.asarray(same, dtype=np.uint8)


@lru_cache(maxsize=8)
def legend_panel(classes: tuple[SegClass, ...], frame_hw: tuple[int, int]) -> UInt8Array:
    """Return the legend as uint8 (h, W, 3): a colour chip and a name per class, in as many rows as a third of the frame holds."""
    text_px = text_height_px(frame_hw)
    width, row_px, gap = frame_hw[1], 2 * text_px, text_px
    places: list[tuple[int, int]] = []
    x, row = gap, 0
    for seg_class in classes:
        item_px = text_px + gap // 2 + _text_width(seg_class.name, text_px) + gap
        if x > gap and x + item_px > width:
            x, row = gap, row + 1
        places.append((x, row))
        x += item_px
    panel: UInt8Array = np.full(((row + 1) * row_px if classes else 0, width, 3), _PAPER, np.uint8)
    for seg_class, (x, row) in zip(classes, places, strict=True):
        top = row * row_px + (row_px - text_px) // 2
        chip = (x, top, x + text_px, top + text_px)
        cv2.rectangle(panel, chip[:2], chip[2:], seg_class.color_rgb[::-1], cv2.FILLED)
        cv2.rectangle(panel, chip[:2], chip[2:], _INK, 1, cv2.LINE_AA)  # a black or dark class is seen too
        _write(panel, seg_class.name, (chip[2] + gap // 2, top + text_px), text_px)
    return panel[: frame_hw[0] // 3 // row_px * row_px]  # some names are more than none


@lru_cache(maxsize=8)
def text_panel(text: str, frame_hw: tuple[int, int]) -> UInt8Array:
    """Return one line of text as uint8 (h, w, 3), no wider than the frame."""
    text_px = text_height_px(frame_hw)
    width = min(frame_hw[1], _text_width(text, text_px) + 2 * text_px)
    panel: UInt8Array = np.full((2 * text_px, width, 3), _PAPER, np.uint8)
    _write(panel, text, (text_px, text_px // 2 + text_px), text_px)
    return panel


def text_height_px(frame_hw: tuple[int, int]) -> int:
    """Return the height of letters: 10 pixels on 270 rows, 24 on 1080; less on narrow frames, 8 at least."""
    return max(8, round(min(6 + frame_hw[0] / 60, frame_hw[1] / 36)))


def _paste(image_bgr: UInt8Array, panel: UInt8Array, *, at_bottom: bool) -> None:
    """Lay a panel over the frame, which shines through a little; leave it out where it would take a third of it."""
    height, width = panel.shape[:2]
    if not height or 3 * height > image_bgr.shape[0]:
        return
    top = image_bgr.shape[0] - height if at_bottom else 0
    spot = image_bgr[top : top + height, :width]
    cv2.addWeighted(spot, 0.2, panel, 0.8, 0, dst=spot)


def _scale(text_px: int) -> float:
    return text_px / cv2.getTextSize("H", _FONT, 1.0, 1)[0][1]


def _text_width(text: str, text_px: int) -> int:
    return int(cv2.getTextSize(text, _FONT, _scale(text_px), _stroke(text_px))[0][0])


def _stroke(text_px: int) -> int:
    return max(1, round(text_px / 9))


def _write(panel: UInt8Array, text: str, at: tuple[int, int], text_px: int) -> None:
    cv2.putText(panel, text, at, _FONT, _scale(text_px), _INK, _stroke(text_px), cv2.LINE_AA)
