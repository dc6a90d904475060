"""Runs a checkpoint, or a network that is being trained, in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models.deploy import DeployModule
from aicsd_deploy.runtime.base import STAGES, Backend, UInt8Array, median_stages
from aicsd_deploy.runtime.driver import gpu_index

if TYPE_CHECKING:
    from typing_extensions import Self


def choose_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu", "cuda" or "cuda:N" stands for.

    Raises:
        MissingDependencyError: a GPU is asked for and PyTorch can use none, or not that many.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        index = gpu_index(name)
        if not torch.cuda.is_available():
            raise MissingDependencyError(
                f"--device {name}: this PyTorch ({torch.__version__}) can use no GPU here. Check nvidia-smi, or use --device cpu."
            )
        if index >= torch.cuda.device_count():
            raise MissingDependencyError(
                f"--device {name}: there are only {torch.cuda.device_count()} GPUs, counted from 0."
            )
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
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in the other runtimes
        return cls(checkpoint.build(), checkpoint.metadata, device=choose_device(device))

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        self.check_frames(frames_NHWC)
        try:
            with torch.inference_mode():
                labels_NHW = self._module(self._upload(frames_NHWC))
                return np.asarray(labels_NHW.cpu().numpy(), dtype=np.uint8)
        except RuntimeError as error:
            # segmentation_models_pytorch and others say so when a size does not fit their strides
            raise InputError(
                f"{self.metadata.model} cannot take frames of {frames_NHWC.shape[1]}x{frames_NHWC.shape[2]}: {error}"
            ) from error

    def time_stages(self, batches_NHWC: Sequence[UInt8Array]) -> dict[str, float]:
        runs = [self._stages_once(batch) for batch in batches_NHWC]
        kept = STAGES if self._device.type == "cuda" else STAGES[1:4]  # on a CPU nothing is moved
        return median_stages(runs, kept=kept)

    def _stages_once(self, frames_NHWC: UInt8Array) -> dict[str, float]:
        marks: list[Any] = [self._mark()]
        with torch.inference_mode():
            frames = self._upload(frames_NHWC)
            marks.append(self._mark())
            images_BCHW = self._module.before(frames)
            marks.append(self._mark())
            logits_BCHW = self._module.network(images_BCHW)
            marks.append(self._mark())
            labels = self._module.after(logits_BCHW, frames.shape[1], frames.shape[2])
            marks.append(self._mark())
            labels.cpu()
            marks.append(self._mark())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return {name: a.elapsed_time(b) for name, (a, b) in zip(STAGES, pairwise(marks), strict=True)}
        return {name: 1000 * (b - a) for name, (a, b) in zip(STAGES, pairwise(marks), strict=True)}

    def _upload(self, frames_NHWC: UInt8Array) -> Tensor:
        # PyTorch takes no negative strides, as frames that are mirrored or turned from RGB to BGR by slicing have.
        return torch.from_numpy(np.ascontiguousarray(frames_NHWC)).to(self._device)

    def _mark(self) -> Any:
        """Note the present moment: a CUDA event in the stream of work, or the host's clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
