"""The frames worth looking at: labels, reference, artefact and where the two differ, as small JPEG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from aicsd_deploy.bench.accuracy import Accuracy
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import segment
from aicsd_deploy.video.overlay import Overlay

PANEL_WIDTH = 320
LOST_BGR, WON_BGR, OTHER_BGR = (60, 60, 230), (80, 190, 60), (40, 170, 240)
"""Colours of a difference: only the reference is right, only the artefact is right, neither is (or nobody knows)."""


@dataclass(frozen=True)
class Picture:
    """One frame of one artefact.

    Attributes:
        artifact: index of the artefact.
        kind: "worst" or "typical".
        frame: the frame's name.
        panels: title → JPEG file.
    """

    artifact: int
    kind: str
    frame: str
    panels: dict[str, bytes]


def draw_frames(
    backends: Sequence[Backend], dataset: SegmentationDataset, accuracies: Sequence[Accuracy], *, reference: int
) -> list[Picture]:
    """Draw the worst and a typical frame of every artefact but the reference."""
    overlay = Overlay(dataset.classes, legend=False)
    pictures = []
    for i, (backend, accuracy) in enumerate(zip(backends, accuracies, strict=True)):
        if i == reference:
            continue
        for kind, index in (("worst", accuracy.worst_frame), ("typical", accuracy.typical_frame)):
            frame_bgr, labels = dataset.load_bgr(index)
            before, now = segment(backends[reference], frame_bgr), segment(backend, frame_bgr)
            layers = {"labels": labels, "reference": before, "artefact": now}
            panels = {title: _jpeg(overlay.draw(frame_bgr.copy(), layer)) for title, layer in layers.items()}
            panels["difference"] = _jpeg(draw_difference(frame_bgr, labels, before, now))
            pictures.append(Picture(i, kind, dataset.name(index), panels))
    return pictures


def draw_difference(frame_bgr: UInt8Array, labels: UInt8Array, before: UInt8Array, now: UInt8Array) -> UInt8Array:
    """Return the frame in pale grey, coloured where the artefact (`now`) differs from the reference (`before`)."""
    grey = cv2.cvtColor(cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    drawn = np.asarray(128 + grey // 3, np.uint8)
    differ = before != now
    drawn[differ] = OTHER_BGR
    drawn[differ & (before == labels)] = LOST_BGR
    drawn[differ & (now == labels)] = WON_BGR
    return drawn


def _jpeg(image_bgr: UInt8Array) -> bytes:
    height = round(image_bgr.shape[0] * PANEL_WIDTH / image_bgr.shape[1])
    small = cv2.resize(image_bgr, (PANEL_WIDTH, height), interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 82])[1])
