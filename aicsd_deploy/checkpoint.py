"""Checkpoints: what a .pt file holds, written whole and loaded safely."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aicsd_deploy.errors import InputError, first_line
from aicsd_deploy.files import atomic_path, existing_file
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models import build_model


@dataclass(frozen=True)
class Checkpoint:
    """A trained network.

    Attributes:
        metadata: what it says about itself.
        model: the network's state dict.
        training: what is needed to go on training (step, optimiser state, …); empty in best.pt.
    """

    metadata: Metadata
    model: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Return the network with its weights, on the CPU, in eval mode.

        Raises:
            InputError: the weights do not fit the network that the metadata names.
        """
        model = build_model(self.metadata.model, num_classes=len(self.metadata.classes), from_artifact=True)
        try:
            model.load_state_dict(self.model)
        except RuntimeError as error:
            raise InputError(
                f"The checkpoint's weights do not fit the network {self.metadata.model!r} that it names "
                f"({str(error).splitlines()[-1].strip()}). It was written by another version of the network."
            ) from error
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically."""
    content = {"metadata": checkpoint.metadata.to_dict(), "model": checkpoint.model, "training": checkpoint.training}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint without executing anything in it.

    Raises:
        InputError: the file is missing, damaged, or no checkpoint of this toolkit.
    """
    path = existing_file(path, "The checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} is no checkpoint that can be loaded safely, or it is damaged ({first_line(error)}). Give the best.pt or last.pt of a run."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "metadata" not in content:
        raise InputError(
            f"{path} is a torch file but no checkpoint of this toolkit: it says nothing about its network and classes. "
            "Give the best.pt or last.pt of a run."
        )
    metadata = Metadata.from_dict(content["metadata"], origin=path)
    return Checkpoint(metadata, content["model"], content.get("training", {}))
