"""Weights and arithmetic of a checkpoint, counted by PyTorch while one frame runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aicsd_deploy.bench.footprint import Work


def torch_work(path: Path) -> Work:
    """Count what one frame of the checkpoint's own size costs; see `Work`."""
    import torch  # a device that runs artefacts need not have it
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from aicsd_deploy.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    network = checkpoint.build()
    moved = 0

    def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal moved
        tensors = [*inputs, output, *module.parameters()]
        moved += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(note)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # It is one operator for a whole attention, which the counter does not know.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # In inference mode, computed weights (weight normalisation) fail under the counter; and of attention in one operator, that
        # of PyTorch 2.11 knows none on the CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, *checkpoint.metadata.image_size_hw))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Work(parameters, counter.get_total_flops() / 1e9, moved / 1e6)
