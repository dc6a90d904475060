"""The one graph that is deployed: uint8 frames in, uint8 labels out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.metadata import Metadata


class Normalize(nn.Module):
    """Turns pixel values (0 to 255, red, green, blue) into what the network was trained on: (x / 255 - mean) / std."""

    scale: Tensor
    offset: Tensor

    def __init__(self, metadata: Metadata) -> None:
        super().__init__()
        self.register_buffer("scale", (1 / (255 * torch.tensor(metadata.std))).view(1, 3, 1, 1), persistent=False)
        offset = -torch.tensor(metadata.mean) / torch.tensor(metadata.std)
        self.register_buffer("offset", offset.view(1, 3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map (B, 3, H, W), uint8 or float, to float32 of the same shape."""
        return images_BCHW.float() * self.scale + self.offset


class DeployModule(nn.Module):
    """Preprocessing, network, upsampling and argmax.

    Takes uint8 frames (N, H, W, 3) in `metadata.channel_order` and gives uint8 labels (N, H, W). Training-time validation,
    every export and every score go through this module, so they cannot disagree.
    """

    def __init__(self, network: nn.Module, metadata: Metadata) -> None:
        super().__init__()
        self.normalize = Normalize(metadata)
        self.network = network
        self.flip = metadata.channel_order == "bgr"

    def forward(self, frames_NHWC: Tensor) -> Tensor:
        logits_BCHW = self.network(self.before(frames_NHWC))
        return self.after(logits_BCHW, frames_NHWC.shape[1], frames_NHWC.shape[2])

    def before(self, frames_NHWC: Tensor) -> Tensor:
        """Turn uint8 frames into the normalised images (N, 3, H, W) that the network takes."""
        # The cast comes before the permutation: TensorRT transposes no uint8.
        images_BCHW = frames_NHWC.float().permute(0, 3, 1, 2)
        if self.flip:
            images_BCHW = images_BCHW.flip(1)
        normalized_BCHW: Tensor = self.normalize(images_BCHW)
        return normalized_BCHW

    def after(self, logits_BCHW: Tensor, height: int, width: int) -> Tensor:
        """Turn logits (N, C, h, w) into uint8 labels (N, height, width)."""
        full_BCHW = F.interpolate(logits_BCHW, size=(height, width), mode="bilinear", align_corners=False)
        return full_BCHW.argmax(dim=1).to(torch.uint8)
