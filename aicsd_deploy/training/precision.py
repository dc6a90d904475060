"""Number formats: which one a training computes in, and a frozen network brought down to it."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

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


def avoid_wrong_gradients(network: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Let grouped convolutions with dilation train in float32 where a CPU would do so in bfloat16.

    Seen with PyTorch 2.11 and 2.15 on CPUs with AVX-512: in channels_last, where the output is wider than 28, oneDNN's
    bfloat16 gradient of such weights depends on memory that nobody wrote. In float32 these layers are no slower.
    """
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.dilation) > 1:
            module.forward = MethodType(_in_float32, module)  # type: ignore[method-assign]


def _in_float32(convolution: nn.Conv2d, features_BCHW: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return type(convolution).forward(convolution, features_BCHW.float())
