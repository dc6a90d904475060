"""Frames of any size through a backend of one size: the only place where frames and label maps are resized."""

from __future__ import annotations

import cv2
import numpy as np

from aicsd_deploy.runtime.base import Backend, UInt8Array


def resize_image(image_HWC: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Resize a picture: area averaging where it shrinks, bilinear where it grows; training uses the same."""
    if image_HWC.shape[:2] == size_hw:
        return image_HWC
    shrinks = size_hw[0] * size_hw[1] < image_HWC.shape[0] * image_HWC.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image_HWC, size_hw[::-1], interpolation=method), dtype=np.uint8)


def resize_labels(labels_HW: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Resize a label map to the nearest pixel centre, so that no label is invented and none is shifted."""
    if labels_HW.shape == size_hw:
        return labels_HW
    return np.asarray(cv2.resize(labels_HW, size_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT), dtype=np.uint8)


def segment(backend: Backend, frame_bgr: UInt8Array) -> UInt8Array:
    """Segment one frame of any size.

    Args:
        backend: the network; the frame is resized to its `image_size_hw` and its channel order.
        frame_bgr: uint8 (H, W, 3), channels as OpenCV gives them.

    Returns:
        uint8 (H, W): class index of every pixel of the frame.
    """
    frame = resize_image(frame_bgr, backend.metadata.image_size_hw)
    if backend.metadata.channel_order == "rgb":
        frame = frame[..., ::-1]
    labels = backend.infer(np.ascontiguousarray(frame)[None])[0]
    return resize_labels(labels, (frame_bgr.shape[0], frame_bgr.shape[1]))
