"""TensorRT and TensorRT-RTX: one API in two modules. Which of them is used is chosen and said here."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections import deque
from functools import lru_cache
from typing import Any, Literal

from aicsd_deploy.errors import MissingDependencyError
from aicsd_deploy.runtime.driver import Gpu, require_gpu

Flavor = Literal["tensorrt", "rtx"]
OLDEST = (10, 3)
"""The oldest TensorRT with the calls this toolkit makes: JetPack 6's."""
NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
_MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_INSTALL = {
    "tensorrt": "pip install 'aicsd-deploy[tensorrt]' (it fetches NVIDIA's libraries); on a Jetson use the system's "
    "python3-libnvinfer",
    "rtx": "pip install 'aicsd-deploy[rtx]'",
}


def load_tensorrt(flavor: Flavor) -> Any:
    """Return the module of a flavor.

    Raises:
        MissingDependencyError: it is not installed, incomplete, or too old.
    """
    name = NAMES[flavor]
    try:
        module = importlib.import_module(_MODULES[flavor])
        version = tuple(int(part) for part in module.__version__.split(".")[:2])
    except (ImportError, AttributeError, ValueError) as error:
        raise MissingDependencyError(
            f"{name} for Python is not installed or incomplete ({error}). Install it with: {_INSTALL[flavor]}."
        ) from error
    if flavor == "tensorrt" and version < OLDEST:
        raise MissingDependencyError(
            f"{name} {module.__version__} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed. Install it with: "
            f"{_INSTALL[flavor]}."
        )
    return module


def require_tensorrt_gpu(flavor: Flavor, *, why: str, index: int = 0) -> Gpu:
    """Return the GPU a TensorRT runs on, or raise MissingDependencyError where there is none or its driver is too old."""
    gpu = require_gpu(index, why=why)
    major = _cuda_major(flavor)
    if major is not None and gpu.cuda[0] < major:
        raise MissingDependencyError(
            f"{why} The driver of {gpu.name} runs CUDA up to {gpu.cuda[0]}.{gpu.cuda[1]}, and the installed {NAMES[flavor]} is "
            f"built for CUDA {major}. Update the driver, or install {NAMES[flavor]} for CUDA {gpu.cuda[0]}."
        )
    return gpu


def _cuda_major(flavor: Flavor) -> int | None:
    """Return the CUDA version a pip-installed TensorRT is built for; the system's packages do not say."""
    for major in (14, 13, 12):
        try:
            importlib.metadata.distribution(f"{_MODULES[flavor]}_cu{major}")
        except importlib.metadata.PackageNotFoundError:
            continue
        return major
    return None


@lru_cache
def logger(flavor: Flavor) -> Any:
    """Return the one logger of a flavor: TensorRT heeds only the first that a process gives it.

    Its `messages` hold the newest warnings and errors.
    """
    trt = load_tensorrt(flavor)

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.messages: deque[str] = deque(maxlen=50)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

    return Logger()
