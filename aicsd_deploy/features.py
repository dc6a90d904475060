"""Features of any network, taken by a forward hook: the network need not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aicsd_deploy.errors import InputError

USUAL_NAMES = ("backbone", "encoder")
"""What networks call the part before the head: ours and torchvision's, segmentation_models_pytorch's."""


class FeatureTap:
    """Keeps the feature map that a layer gave in the last forward pass."""

    def __init__(self, network: nn.Module, layer: str | None, *, who: str) -> None:
        """Hook a layer.

        Args:
            network: the network.
            layer: name of the layer, as in `named_modules()`, the outer parts of the name left out; None takes the backbone.
                Of a layer that gives several maps, the last one counts.
            who: "student" or "teacher", for messages.

        Raises:
            InputError: there is no such layer.
        """
        self.network, self.who = network, who
        self.name = _find(network, layer, who)
        self._map: Tensor | None = None
        # Not compiled: else the map is a second result of the whole network, from which its logits do not come.
        network.get_submodule(self.name).register_forward_hook(torch.compiler.disable(self._keep))  # type: ignore[no-untyped-call]

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._map = _last_map(output)

    def take(self) -> Tensor:
        """Return the map (B, C, h, w) of the last forward pass, and forget it.

        Raises:
            InputError: the layer gave none.
        """
        features, self._map = self._map, None
        if features is None:
            raise InputError(
                f"The {self.who}'s layer {self.name!r} gives no feature map (B, C, h, w). Name another with --{self.who}-layer."
            )
        return features

    @torch.no_grad()
    def channels(self, image_size_hw: tuple[int, int], device: torch.device) -> int:
        """Return how many channels the map has; one forward pass that leaves the network as it was."""
        # Not through __call__: where the network is to be compiled, it would be compiled for this one image first.
        modes = [module.training for module in self.network.modules()]
        self.network.eval()
        self.network.forward(torch.zeros(1, 3, *image_size_hw, dtype=torch.uint8, device=device))
        for module, training in zip(self.network.modules(), modes, strict=True):
            module.training = training
        return self.take().shape[1]


def _find(network: nn.Module, layer: str | None, who: str) -> str:
    names = [name for name, _ in network.named_modules() if name]
    for wanted in [*USUAL_NAMES, *_base_models(network)] if layer is None else [layer]:
        fitting: list[str] = [name for name in names if f".{name}".endswith(f".{wanted}")]
        if fitting:
            return min(fitting, key=lambda name: name.count("."))
    outer = [name for name in names if name.count(".") <= 2][:12]
    what = f"has no layer {layer!r}" if layer else f"has no part named {' or '.join(USUAL_NAMES)}, whose features serve"
    raise InputError(f"The {who} {what}. Name one with --{who}-layer. Its outer parts: {', '.join(outer)}.")


def _base_models(network: nn.Module) -> list[str]:
    """Return what networks of transformers call the part before the head."""
    return [
        prefix
        for module in network.modules()
        if isinstance(prefix := getattr(module, "base_model_prefix", None), str) and prefix
    ]


def _last_map(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.ndim == 4 else None
    parts: Sequence[Any] = (
        list(output.values()) if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    )
    found = [part for part in map(_last_map, parts) if part is not None]
    return found[-1] if found else None
