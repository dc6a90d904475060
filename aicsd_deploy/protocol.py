"""Scoring as papers do it: at the picture's own size, in sliding windows, at several scales, mirrored.

An exported student is scored as it is deployed (`evaluate`). This is for comparing checkpoints with published numbers, which
are measured in one of these ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.errors import InputError, first_line
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models.deploy import Normalize
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.runtime.frames import resize_image

STRIDE = 32
"""Where a network takes only some sizes, pictures are padded to multiples of this, which every common network takes."""
GREY = 114.0


@dataclass(frozen=True)
class Protocol:
    """How pictures are shown to the network.

    Attributes:
        native: at their own size, instead of resized to the network's.
        window_hw: in overlapping windows of this size (each two thirds of a window on; no larger than the picture), whose
            logits are averaged; None: whole.
        scales: at each of these factors; probabilities are averaged at the picture's own size.
        flip: mirrored too.
    """

    native: bool = False
    window_hw: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


class ProtocolSegmenter:
    """Segments a frame of any size with a network, by a protocol."""

    def __init__(self, network: nn.Module, metadata: Metadata, protocol: Protocol, *, device: torch.device) -> None:
        self.metadata, self.protocol, self._device = metadata, protocol, device
        self._module = nn.Sequential(Normalize(metadata), network).to(device).eval()
        self._takes_any_size = True  # until it has refused one

    @torch.inference_mode()
    def __call__(self, frame_bgr: UInt8Array) -> UInt8Array:
        """Return the class of every pixel, uint8 (H, W), of a frame, uint8 (H, W, 3) as OpenCV gives it."""
        size = (frame_bgr.shape[0], frame_bgr.shape[1])
        base = size if self.protocol.native else self.metadata.image_size_hw
        total = torch.zeros(1, len(self.metadata.classes), *size, device=self._device)
        for scale in self.protocol.scales:
            scaled = resize_image(frame_bgr, (max(1, round(base[0] * scale)), max(1, round(base[1] * scale))))
            image = torch.from_numpy(np.ascontiguousarray(scaled[..., ::-1])).to(self._device).permute(2, 0, 1)[None]
            for mirrored in (False, True) if self.protocol.flip else (False,):
                logits = self._logits(image.flip(3) if mirrored else image)
                logits = logits.flip(3) if mirrored else logits
                full = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                total += full.softmax(dim=1)
        return np.asarray(total.argmax(dim=1)[0].cpu().numpy(), dtype=np.uint8)

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        """Return the logits at the size of the image."""
        if self.protocol.window_hw is None:
            return self._whole(image_BCHW)
        height, width = image_BCHW.shape[2:]
        window = (min(self.protocol.window_hw[0], height), min(self.protocol.window_hw[1], width))
        logits = torch.zeros(1, len(self.metadata.classes), height, width, device=self._device)
        counts = torch.zeros(1, 1, height, width, device=self._device)
        for top in _starts(height, window[0]):
            for left in _starts(width, window[1]):
                part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                logits[part] += self._whole(image_BCHW[part])
                counts[part] += 1
        return logits / counts

    def _whole(self, image_BCHW: Tensor) -> Tensor:
        """Return the logits at the size of the image, which is padded only for a network that does not take it as it is.

        What is padded counts in every network that pools over the whole picture, and no paper's protocol has it.
        """
        height, width = image_BCHW.shape[2:]
        if self._takes_any_size:
            try:
                return _at_its_size(self._module, image_BCHW.float())
            except torch.OutOfMemoryError:  # says nothing about sizes that the network takes
                raise
            except (RuntimeError, ValueError, AssertionError):
                self._takes_any_size = False
        right, below = -width % STRIDE, -height % STRIDE
        try:
            padded = F.pad(image_BCHW.float(), (0, right, 0, below), value=GREY)
            return _at_its_size(self._module, padded)[..., :height, :width]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise InputError(
                f"{self.metadata.model} cannot take images of {height}x{width}: {first_line(error)}."
            ) from error


def _at_its_size(module: nn.Module, image_BCHW: Tensor) -> Tensor:
    return F.interpolate(module(image_BCHW), size=image_BCHW.shape[2:], mode="bilinear", align_corners=False)


def _starts(length: int, window: int) -> Iterator[int]:
    """Yield where windows start, so that they cover the length and overlap by a third or more."""
    step = max(1, window * 2 // 3)
    yield from range(0, length - window, step)
    yield length - window
