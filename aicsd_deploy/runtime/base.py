"""The one contract of everything that runs a network: uint8 frames in, uint8 labels out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aicsd_deploy.errors import InputError
from aicsd_deploy.files import existing_file
from aicsd_deploy.metadata import Metadata, onnx_says

if TYPE_CHECKING:
    from typing_extensions import Self

UInt8Array = npt.NDArray[np.uint8]
SUFFIXES = (".pt", ".onnx", ".plan")
STAGES = ("host_to_device", "preprocessing", "network", "postprocessing", "device_to_host")
"""What a frame goes through, in order; see `Backend.time_stages`."""


class Backend(ABC):
    """A network that is loaded and ready to run.

    Attributes:
        metadata: what the artefact says about itself.
        name: runtime and provider that really run, for example "onnxruntime CPU".
        device: "cpu", "cuda:0", ...
        concurrency: how many calls of `infer` from different threads run at once and are faster for it.
    """

    metadata: Metadata
    name: str
    device: str
    concurrency: int = 1

    @abstractmethod
    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        """Segment a batch of frames.

        Args:
            frames_NHWC: uint8 (N, H, W, 3), channels in `metadata.channel_order`. H and W are `metadata.image_size_hw`
                unless "size" is in `metadata.dynamic`; N is 1 unless "batch" is.

        Returns:
            uint8 (N, H, W): class index of every pixel; the caller's own, not changed by the next call.

        Raises:
            InputError: the frames have another shape or type than the artefact takes.
        """

    def time_stages(self, batches_NHWC: Sequence[UInt8Array]) -> dict[str, float]:
        """Return the median milliseconds of those `STAGES` that the runtime can tell apart; none by default.

        On a GPU they are taken with CUDA events or the runtime's own profiler. The network goes from the first to the last
        convolution or matrix multiplication.

        Args:
            batches_NHWC: what to run, as `infer` takes it; the first is a warm-up.
        """
        return {}

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what the backend holds; it is not used after."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_frames(self, frames_NHWC: UInt8Array) -> None:
        """Raise InputError unless `frames_NHWC` fits what `infer` takes."""
        shape, height_width = frames_NHWC.shape, self.metadata.image_size_hw
        if frames_NHWC.dtype != np.uint8 or frames_NHWC.ndim != 4 or shape[3] != 3 or 0 in shape:
            raise InputError(f"Frames must be uint8 (N, H, W, 3), not {frames_NHWC.dtype} {shape}.")
        if "size" not in self.metadata.dynamic and shape[1:3] != height_width:
            raise InputError(
                f"This artefact takes frames of {height_width[0]}x{height_width[1]} (HxW), not {shape[1]}x{shape[2]}. "
                "Resize them, or export with --dynamic size."
            )
        if "batch" not in self.metadata.dynamic and shape[0] != 1:
            raise InputError(f"This artefact takes one frame at a time, not {shape[0]}. Export with --dynamic batch.")


def median_stages(runs: Sequence[dict[str, float]], *, kept: Sequence[str] = STAGES) -> dict[str, float]:
    """Return the median of each stage over all runs but the first, a warm-up, for `Backend.time_stages`."""
    timed = runs[1:]
    return {name: float(np.median([run[name] for run in timed])) for name in kept if timed and name in timed[0]}


def open_backend(
    path: Path | str, *, device: str = "auto", threads: int | None = None, memory: str = "auto"
) -> Backend:
    """Load an artefact and make it ready to run.

    Args:
        path: a .pt checkpoint, an .onnx file or a TensorRT .plan.
        device: "auto" (a GPU where the runtime can use one, else the CPU), "cpu", "cuda" or "cuda:N".
        threads: CPU threads the network may use; None leaves it to the runtime.
        memory: who owns the GPU memory of a .plan: "torch", "cuda-python", "pycuda", or "auto" for the first that is there.

    Raises:
        InputError: the file is missing, damaged, or not one of the three kinds.
        MissingDependencyError: the runtime or the device that it needs is not there.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in SUFFIXES:
        raise InputError(f"{path} is not an artefact this toolkit runs. It takes {', '.join(SUFFIXES)} files.")
    if ":" in str(path) and suffix not in SUFFIXES and not path.exists():
        raise InputError(
            f"{path} is no file. A network from elsewhere is exported before it runs: python export/to_onnx.py {path} --data SPEC"
        )
    existing_file(path, "The artefact")
    # Each runtime is imported only when a file asks for it, so that a device needs only the one it uses.
    if suffix == ".onnx" and onnx_says(path, "int8_target", "openvino"):
        from aicsd_deploy.runtime.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(path, device=device, threads=threads)
    if suffix == ".onnx":
        from aicsd_deploy.runtime.ort_backend import OrtBackend

        return OrtBackend(path, device=device, threads=threads)
    if suffix == ".plan":
        from aicsd_deploy.runtime.trt_backend import TensorRTBackend

        return TensorRTBackend(path, device=device, memory=memory)
    from aicsd_deploy.runtime.torch_backend import TorchBackend

    return TorchBackend.open(path, device=device, threads=threads)
