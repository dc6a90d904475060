"""The NVIDIA driver and the GPUs behind it, asked without loading anything that could crash where there is none."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from aicsd_deploy.errors import MissingDependencyError

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """A GPU and its driver.

    Attributes:
        name: as the driver gives it, for example "NVIDIA GeForce RTX 4090".
        target: its compute capability as TensorRT names it, for example "sm89".
        cuda: the newest CUDA version that the driver runs, for example (13, 0).
    """

    name: str
    target: str
    cuda: tuple[int, int]


def gpu_index(device: str) -> int:
    """Return N of "cuda:N"; 0 for "cuda" and "auto", which name no GPU."""
    return int(device.partition(":")[2] or 0)


def require_gpu(index: int = 0, *, why: str) -> Gpu:
    """Return a GPU, or raise MissingDependencyError with what is missing; `why` says who needs it, as a full sentence.

    TensorRT's runtime is never touched before this holds: without a driver it can crash the process.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MissingDependencyError(
            f"{why} This machine has no NVIDIA driver ({error}). Run this on the machine with the GPU (in a container, start "
            "it with --gpus all)."
        ) from error
    code = cuda.cuInit(0)
    if code != 0:
        raise MissingDependencyError(
            f"{why} The NVIDIA driver is installed but does not start (cuInit gave CUDA error {code}). Check nvidia-smi; in a "
            "container, start it with --gpus all."
        )
    count, version = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if index >= count.value:
        raise MissingDependencyError(f"{why} There is no GPU {index}: the driver sees {count.value}, counted from 0.")
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        target=f"sm{major.value}{minor.value}",
        cuda=(version.value // 1000, version.value % 1000 // 10),
    )
