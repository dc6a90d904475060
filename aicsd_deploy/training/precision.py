"""Number formats: which one a training computes in, and a frozen network brought down to it."""

from __future__ import annotations

import torch
from torch import nn

from aicsd_deploy.config import Precision


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return what convolutions are computed in, or None for float32 throughout.

    "auto" is bfloat16 on GPUs that compute in it, float16 on older ones, and float32 on the CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        # Without emulation: Turing accepts bfloat16 and is slow in it.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def lowered(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a frozen network whose convolutions hold weights in `dtype`; it is to be called under autocast.

    Autocast keeps converted weights for a step only where they are trained; those of a frozen network it would convert at
    every call. Normalisation stays in float32.
    """
    if dtype is not None:
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.to(dtype)
    return network
