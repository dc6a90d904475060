"""Runs a checkpoint, or a network that is being trained, in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import nn

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.export.deploy_module import DeployModule
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.runtime.base import Backend, UInt8Array


def choose_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu", "cuda" or "cuda:N" stands for.

    Raises:
        MissingDependencyError: a GPU is asked for and PyTorch can use none, or not that many.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        index = int(name[5:] or 0)
        if not torch.cuda.is_available():
            raise MissingDependencyError(
                f"--device {name}: this PyTorch ({torch.__version__}) can use no GPU here. Check nvidia-smi, or use --device cpu."
            )
        if index >= torch.cuda.device_count():
            raise MissingDependencyError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs.")
        return torch.device("cuda", index)
    return torch.device(name)


class TorchBackend(Backend):
    """A network in PyTorch; takes any batch and, as fully convolutional networks do, frames of any size."""

    def __init__(self, network: nn.Module, metadata: Metadata, *, device: torch.device) -> None:
        """Take a network as it is, for example one in training, and put it into eval mode."""
        self.metadata = metadata.replace(dynamic=("batch", "size"))
        self.name = "torch CUDA" if device.type == "cuda" else "torch CPU"
        self.device = str(device)
        self._device = device
        self._module = DeployModule(network, metadata).to(device).eval()

    @classmethod
    def open(cls, path: Path, *, device: str = "auto", threads: int | None = None) -> Self:
        """Load a checkpoint; see `open_backend`."""
        checkpoint = load_checkpoint(path)
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(checkpoint.build(), checkpoint.metadata, device=choose_device(device))

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        self.check_frames(frames_NHWC)
        try:
            with torch.inference_mode():
                labels_NHW = self._module(torch.from_numpy(frames_NHWC).to(self._device))
                return np.asarray(labels_NHW.cpu().numpy(), dtype=np.uint8)
        except RuntimeError as error:
            # segmentation_models_pytorch and others say so when a size does not fit their strides
            raise InputError(
                f"{self.metadata.model} cannot take frames of {frames_NHWC.shape[1]}x{frames_NHWC.shape[2]}: {error}"
            ) from error
