"""Augmentation, the same for a picture on every run: what is drawn depends on (seed, epoch, index) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from aicsd_deploy.data.dataset import LabelledImage
from aicsd_deploy.metadata import IGNORE_LABEL
from aicsd_deploy.runtime.frames import resize_image, resize_labels, scaled


def derived_seed(*parts: int | str) -> int:
    """Return a seed that depends on all `parts` and is alike in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop and flip of a picture; photometric change of a batch, on the device that it lies on.

    Attributes:
        image_size_hw: size that the network works on.
        scale: the picture is first brought to `image_size_hw`, then scaled by a factor drawn from this range (uniform in
            the logarithm).
        flip: mirror half of the pictures.
        color_jitter: strength of the change of brightness, contrast and saturation; 0 leaves the colours.
        crop_size_hw: size of the crop that training sees; None is `image_size_hw`.
        keep_aspect: the picture covers `image_size_hw` with its proportions kept, instead of being stretched to it.
        picture_scale: pictures come this many times as high and wide as the crop that their labels have.
    """

    image_size_hw: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    color_jitter: float = 0.3
    crop_size_hw: tuple[int, int] | None = None
    keep_aspect: bool = False
    picture_scale: float = 1.0

    def __call__(self, pair: LabelledImage, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return the picture, uint8 (3, H, W), and its labels, uint8 (H, W) or less; what was padded is 255."""
        crop = self.crop_size_hw or self.image_size_hw
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            low, high = (torch.log(torch.tensor(v)) for v in self.scale)
            factor = torch.exp(low + (high - low) * torch.rand(())).item()
            base = scaled(self.image_size_hw, self.picture_scale)
            if self.keep_aspect:
                cover = max(base[0] / pair[0].shape[0], base[1] / pair[0].shape[1])
                base = (round(pair[0].shape[0] * cover), round(pair[0].shape[1] * cover))
            height, width = (max(1, round(side * factor)) for side in base)
            image = tv_tensors.Image(torch.from_numpy(resize_image(pair[0], (height, width)).copy()).permute(2, 0, 1))
            labels = tv_tensors.Mask(torch.from_numpy(resize_labels(pair[1], (height, width)).copy()))
            image, labels = self._random_part(scaled(crop, self.picture_scale))(image, labels)
        small = torch.from_numpy(resize_labels(labels.numpy(), crop))
        return image.as_subclass(Tensor).contiguous(), small.contiguous()

    def _random_part(self, crop_hw: tuple[int, int]) -> v2.Compose:
        steps: list[v2.Transform] = [
            v2.RandomCrop(
                crop_hw,
                pad_if_needed=True,
                # Padding is mid-grey: no edge as strong as one to black.
                fill={tv_tensors.Image: 114, tv_tensors.Mask: IGNORE_LABEL},
            )
        ]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        return v2.Compose(steps)

    def recolor(self, images_BCHW: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Return pictures, uint8 (B, 3, H, W), in other colours, each by its seed.

        It is a large part of the work (docs/results/throughput.md) that a GPU can take from the workers.
        """
        if self.color_jitter == 0:
            return images_BCHW
        jitter = v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter)
        recolored = []
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(images_BCHW, seeds, strict=True):
                torch.default_generator.manual_seed(seed)  # what is drawn is drawn on the host
                recolored.append(jitter(image))
        return torch.stack(recolored)
