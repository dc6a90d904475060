"""LR-ASPP: a head light enough for real time on a CPU.

Source: Howard et al., "Searching for MobileNetV3", arXiv 1905.02244, section 6.4; here on MobileNetV2.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.segmentation.lraspp import LRASPPHead

from aicsd_deploy.models.backbones import Backbone


class LRASPP(nn.Module):
    """LR-ASPP: normalised images (B, 3, H, W) to logits (B, num_classes, H/8, W/8), not upsampled."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = LRASPPHead(backbone.channels[1], backbone.channels[-1], num_classes, inter_channels=128)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = self.backbone(images_BCHW)
        logits: Tensor = self.head({"low": maps[1], "high": maps[-1]})
        return logits
