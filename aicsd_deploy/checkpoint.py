"""Checkpoints: what a .pt file holds, written whole and loaded safely."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aicsd_deploy.errors import AicsdError, InputError, first_line, first_sentence
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
        self.load_into(model)
        return model.eval()

    def load_into(self, model: nn.Module) -> None:
        """Give a network these weights.

        Raises:
            InputError: they do not fit it.
        """
        try:
            model.load_state_dict(self.model)
        except RuntimeError as error:
            raise InputError(
                f"The checkpoint's weights do not fit the network {self.metadata.model!r} that it names "
                f"({str(error).splitlines()[-1].strip()}). It was written by another version of the network."
            ) from error


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; PyTorch's container holds a checksum (CRC-32) of every tensor.

    Raises:
        AicsdError: the disk is full or fails; what stood at `path` is as it was.
    """
    content = {"metadata": checkpoint.metadata.to_dict(), "model": checkpoint.model, "training": checkpoint.training}
    try:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError is what PyTorch makes of a full disk
        free_mib = shutil.disk_usage(path.parent).free / 2**20
        kept = f"The {path.name} that was there before is whole" if path.exists() else "Nothing was left behind"
        raise AicsdError(
            f"{path} cannot be written ({first_line(error)}): {free_mib:.0f} MiB are free on its disk. {kept}. "
            "Make room, then go on with --resume auto."
        ) from error


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint without executing anything in it, and check its checksums.

    Raises:
        InputError: the file is missing, damaged, or no checkpoint of this toolkit.
    """
    path = existing_file(path, "The checkpoint")
    if path.suffix in (".onnx", ".plan"):
        raise InputError(f"{path} is an exported file and no checkpoint. Give the best.pt that it was exported from.")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} is no checkpoint that can be loaded safely, or it is damaged ({first_sentence(error)}). Give the best.pt or last.pt of a run."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "metadata" not in content:
        raise InputError(
            f"{path} is a torch file but no checkpoint of this toolkit: it says nothing about its network and classes. "
            "Give the best.pt or last.pt of a run."
        )
    metadata = Metadata.from_dict(content["metadata"], origin=path)
    return Checkpoint(metadata, content["model"], content.get("training", {}))


def _check_sums(path: Path) -> None:
    """Raise if a tensor is not what was written: `torch.load` itself would take a flipped bit without a word."""
    if not zipfile.is_zipfile(path):
        return  # cut off, or nothing of ours: torch.load says so
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
