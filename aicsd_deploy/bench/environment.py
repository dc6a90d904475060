"""What a figure was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from aicsd_deploy.metadata import git_revision

PACKAGES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "av",
    "openvino",
    "mlcommons-loadgen",
)
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")
"""Vector extensions that decide how quick float and INT8 arithmetic are, as /proc/cpuinfo calls them."""


def environment() -> dict[str, Any]:
    """Return processor, memory, GPU with driver, versions of the packages that matter, and the git revision."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    flags = " ".join(cpuinfo("flags", "Features")[:1]).split()
    return {
        "cpu": next(iter(cpuinfo("model name")), "") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in CPU_FEATURES if name in flags],
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_names(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "git": git_revision(),
    }


def cpuinfo(*keys: str) -> list[str]:
    """Return what /proc/cpuinfo says under any of some keys, core by core; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() in keys]


def _gpu_names() -> list[str]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
