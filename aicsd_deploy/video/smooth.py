"""Labels that hold still: a class that appears out of nothing is shown only when it has lasted."""

from __future__ import annotations

import cv2
import numpy as np

from aicsd_deploy.runtime.base import UInt8Array

CUT_FRACTION = 0.6
"""Where more of the picture than this changes its label at once, the scene has changed, and smoothing begins anew."""
REACH_FRACTION = 1 / 22
"""How far, as a part of the height, the border of a class may move from one frame to the next."""


class LabelSmoother:
    """Shows a pixel's new label at once if it was shown nearby before, so that borders move as they do; else once it has lasted.

    Args:
        frames: how many frames in a row a label must stand that comes out of nothing; 1 passes labels on as they are.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self._shown: UInt8Array | None = None

    def __call__(self, labels: UInt8Array) -> UInt8Array:
        """Return smoothed labels for the next frame.

        Args:
            labels: uint8 (H, W), of one size for all frames.

        Returns:
            uint8 (H, W), of which the caller is the owner.
        """
        if self.frames <= 1:
            return labels
        shown = self._shown
        if shown is None or _is_cut(labels, shown):
            self._shown, self._last = labels.copy(), labels.copy()
            self._stood = np.full_like(labels, self.frames)
            return labels
        same = np.asarray(cv2.compare(labels, self._last, cv2.CMP_EQ))
        # Beyond 255 it begins at 0 again, which changes nothing: by then the label is shown.
        self._stood = np.where(same, self._stood + np.uint8(1), np.uint8(1))
        np.copyto(self._last, labels)
        taken = _shown_nearby(labels, shown)
        taken |= np.where(self._stood >= self.frames, np.uint8(255), np.uint8(0))
        cv2.copyTo(labels, taken, shown)
        return np.copy(shown)


def _shown_nearby(labels: UInt8Array, shown: UInt8Array) -> UInt8Array:
    """Return 255 where the label was shown above, below, left or right of the pixel, as far off as borders move."""
    height, width = labels.shape
    reach = max(1, round(height * REACH_FRACTION))
    around = np.asarray(cv2.copyMakeBorder(shown, reach, reach, reach, reach, cv2.BORDER_REPLICATE))
    found = np.zeros_like(labels)
    for y, x in ((0, reach), (2 * reach, reach), (reach, 0), (reach, 2 * reach)):
        found |= np.asarray(cv2.compare(labels, around[y : y + height, x : x + width], cv2.CMP_EQ), dtype=np.uint8)
    return found


def _is_cut(labels: UInt8Array, shown: UInt8Array) -> bool:
    changed = int(cv2.countNonZero(cv2.absdiff(labels[::4, ::4], shown[::4, ::4])))
    return changed > CUT_FRACTION * labels[::4, ::4].size
