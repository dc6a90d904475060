"""Labels that hold still: a pixel changes its class only when the new one has lasted."""

from __future__ import annotations

import cv2
import numpy as np

from aicsd_deploy.runtime.base import UInt8Array

CUT_FRACTION = 0.6
"""Where more of the picture than this changes its label at once, the scene has changed, and smoothing begins anew."""


class LabelSmoother:
    """Shows a pixel's new label once it has stood for `frames` frames in a row; the price is that edges lag as many less one.

    Args:
        frames: 1 passes labels on as they are.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self._shown: UInt8Array | None = None

    def __call__(self, labels: UInt8Array) -> UInt8Array:
        """Return smoothed labels for the next frame.

        Args:
            labels: uint8 (H, W).

        Returns:
            uint8 (H, W), of which the caller is the owner.
        """
        if self.frames <= 1:
            return labels
        if self._shown is None or self._shown.shape != labels.shape or self._is_cut(labels):
            self._shown, self._candidate = labels.copy(), labels.copy()
            self._stood = np.full_like(labels, self.frames)
            return labels
        same = cv2.compare(labels, self._candidate, cv2.CMP_EQ)
        cv2.bitwise_and(self._stood, same, dst=self._stood)  # 0 where the label is new
        self._stood = np.minimum(self._stood, 254) + np.uint8(1)
        np.copyto(self._candidate, labels)
        np.copyto(self._shown, labels, where=self._stood >= self.frames)
        return self._shown.copy()

    def _is_cut(self, labels: UInt8Array) -> bool:
        assert self._shown is not None
        changed = int(cv2.countNonZero(cv2.absdiff(labels[::4, ::4], self._shown[::4, ::4])))
        return changed > CUT_FRACTION * labels[::4, ::4].size
