"""DeepLabV3+ as the AICSD paper uses it: plain convolutions, output stride 16.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", arXiv 1802.02611;
with plain 256-channel ASPP convolutions, a 48-channel low-level branch and two 256-channel 3×3 decoder convolutions. The code
that the paper was written with (github.com/jfzhang95/pytorch-deeplab-xception) has a dropout of 0.5 between those two as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.models.backbones import Backbone


def conv_bn_relu(inputs: int, outputs: int, *, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the size, batch normalisation and ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: one 1×1 branch, three dilated 3×3 branches, one image-level branch."""

    def __init__(self, inputs: int, outputs: int = 256) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(inputs, outputs), *(conv_bn_relu(inputs, outputs, kernel=3, dilation=r) for r in (6, 12, 18))]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(inputs, outputs))
        self.project = nn.Sequential(conv_bn_relu(5 * outputs, outputs), nn.Dropout(0.5))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        pooled = self.pool(x_BCHW).expand(-1, -1, *x_BCHW.shape[2:])
        result: Tensor = self.project(torch.cat([*(branch(x_BCHW) for branch in self.branches), pooled], dim=1))
        return result


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+: normalised images (B, 3, H, W) to logits (B, num_classes, H/4, W/4), not upsampled.

    With `align_corners`, feature maps are upsampled with aligned corners, and logits too, to (B, num_classes, H, W): on that
    grid nobody else reads them.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.backbone = backbone
        self.aspp = ASPP(backbone.channels[-1])
        self.low_level = conv_bn_relu(backbone.channels[0], 48)
        self.decoder = nn.Sequential(
            conv_bn_relu(256 + 48, 256, kernel=3), conv_bn_relu(256, 256, kernel=3), nn.Dropout(0.1)
        )
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = self.backbone(images_BCHW)
        low = self.low_level(maps[0])
        high = F.interpolate(self.aspp(maps[-1]), size=low.shape[2:], mode="bilinear", align_corners=self.align_corners)
        logits: Tensor = self.classifier(self.decoder(torch.cat([high, low], dim=1)))
        if self.align_corners:
            logits = F.interpolate(logits, size=images_BCHW.shape[2:], mode="bilinear", align_corners=True)
        return logits
