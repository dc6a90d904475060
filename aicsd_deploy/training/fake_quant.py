"""INT8 imitated while a network trains, so that it learns to live with eight bits (quantisation-aware training).

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv 1712.05877, section 3. Only what convolutions and linear layers read is rounded: their weights, per output channel, and
their input. The rounding passes gradients on as if it were not there. The weights stay float32 numbers under their old names,
so a checkpoint is like any other; export/to_int8.py makes eight bits of it. A convolution's scale per output channel makes
rounding its weights the same as rounding them with batch normalisation folded in, so nothing is folded here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.training.distributed import sum_over_processes, world_size

MEMORY = 0.95
"""Share of the old value in the running mean of an activation's lowest and highest value."""
_SMALLEST_SCALE = 1e-12


def imitate_int8(network: nn.Module, *, symmetric: bool) -> dict[str, Tensor]:
    """Let a network's convolutions and linear layers compute as in INT8, in place; its state dict stays that of the float network.

    Batch normalisation keeps its statistics from now on, also in training, as the exported file does; its scale and shift
    still learn. Layers of other types than `nn.Conv2d` and `nn.Linear` themselves stay in float.

    Args:
        network: on its device, trained in float.
        symmetric: activations are signed and their range symmetric about 0, as TensorRT wants them; else unsigned, with a
            zero point, as for CPUs.

    Returns:
        The lowest and the highest value of each such layer's input, (2,), by a name; measured while the network trains. They
        belong to the run and not to the state dict.
    """
    ranges = {}
    for name, module in network.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.__class__ = _Int8Conv2d if isinstance(module, nn.Conv2d) else _Int8Linear
            assert isinstance(module, _Int8Conv2d | _Int8Linear)
            module.symmetric = symmetric
            module.register_buffer("input_range", torch.zeros(2, device=module.weight.device), persistent=False)
            ranges[f"input_range_{name.replace('.', '/')}"] = module.input_range
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = _FrozenBatchNorm2d
            module.eval()
    return ranges


def rounded_weight(weight: Tensor) -> Tensor:
    """Return the weight of a convolution or a linear layer, (out, in, …), as INT8 shows it: symmetric, one scale per output channel."""
    highest = weight.detach().abs().flatten(1).amax(dim=1).float()
    scale = (highest / 127).clamp(min=_SMALLEST_SCALE)
    # Zero points of floats: PyTorch looks at the values of whole ones, for which a GPU is waited for.
    zero = torch.zeros_like(scale)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def rounded_activation(values: Tensor, low_high: Tensor, *, symmetric: bool) -> Tensor:
    """Return activations as INT8 shows them; what lies outside the range (2,), which is widened to hold 0, is cut off."""
    low, high = low_high.detach().clamp(max=0)[0], low_high.detach().clamp(min=0)[1]
    if symmetric:
        scale = (torch.maximum(-low, high) / 127).clamp(min=_SMALLEST_SCALE)
        zero, levels = torch.zeros_like(scale), (-127, 127)
    else:
        scale = ((high - low) / 255).clamp(min=_SMALLEST_SCALE)
        zero, levels = (-low / scale).round(), (0, 255)
    rounded: Tensor = torch.fake_quantize_per_tensor_affine(values, scale, zero.to(torch.int32), *levels)
    return rounded


class _ReadsInt8(nn.Module):
    input_range: Tensor
    symmetric: bool

    def _read(self, input: Tensor) -> Tensor:
        values = input.float()
        if self.training:
            self._observe(values.detach())
        return rounded_activation(values, self.input_range, symmetric=self.symmetric)

    @torch.no_grad()
    def _observe(self, values: Tensor) -> None:
        seen = sum_over_processes(torch.stack(values.aminmax())) / world_size()
        first = (self.input_range == 0).all()
        self.input_range.copy_(torch.where(first, seen, torch.lerp(seen, self.input_range, MEMORY)))


class _Int8Conv2d(_ReadsInt8, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(self._read(input), rounded_weight(self.weight), self.bias)
        return out


class _Int8Linear(_ReadsInt8, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self._read(input), rounded_weight(self.weight), self.bias)


class _FrozenBatchNorm2d(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> _FrozenBatchNorm2d:
        return super().train(False)
