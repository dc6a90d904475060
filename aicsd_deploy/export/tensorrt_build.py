"""TensorRT: whether this machine can build an engine, and if not, exactly why."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType

from aicsd_deploy.errors import MissingDependencyError


def require_driver() -> None:
    """Raise MissingDependencyError unless an NVIDIA driver is there and initialises.

    TensorRT is never touched before this holds: without a driver its runtime can crash the process.
    """
    try:
        code = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError as error:
        raise MissingDependencyError(
            "TensorRT engines are built on the GPU that they will run on, and this machine has no NVIDIA driver "
            f"({error}). Run this command on the machine with the GPU; the .onnx file is all it needs."
        ) from error
    if code != 0:
        raise MissingDependencyError(
            f"The NVIDIA driver is installed but does not start (cuInit gave CUDA error {code}). Check nvidia-smi; in a "
            "container, start it with --gpus all."
        )


def require_tensorrt() -> ModuleType:
    """Return the module `tensorrt`, or raise MissingDependencyError with the way to get it."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise MissingDependencyError(
            f"TensorRT for Python is not installed or incomplete ({error}). Install it with: pip install "
            "'aicsd-deploy[tensorrt]' (fetches NVIDIA's libraries); on a Jetson use the system's python3-libnvinfer."
        ) from error
