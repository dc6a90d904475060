"""Runs an .onnx file that `export/to_int8.py --target openvino` made, in OpenVINO on the CPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.metadata import ONNX_KEY, Metadata
from aicsd_deploy.runtime.base import Backend, UInt8Array, median_stages
from aicsd_deploy.runtime.operators import stages


def import_openvino() -> Any:
    """Return the module `openvino`, imported without its telemetry.

    That tells the maker, unasked, that OpenVINO was imported, from a fork of this process with its threads, in which locks that
    other threads held stay locked: it may never end.

    Raises:
        MissingDependencyError: it is not installed.
    """
    absent: Any = None  # what makes an import fail; OpenVINO then takes a stand-in that sends nothing
    hidden = sys.modules.setdefault("openvino_telemetry", absent) is absent
    try:
        import openvino
        import openvino.frontend
    except ImportError as error:
        raise MissingDependencyError(
            "Files made with --target openvino need OpenVINO. Install it with: pip install 'aicsd-deploy[openvino]'"
        ) from error
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino


class OpenVinoBackend(Backend):
    """An ONNX file in OpenVINO's CPU plugin; what is not quantised runs in float32, never in a smaller type by itself."""

    def __init__(self, path: Path, *, device: str = "auto", threads: int | None = None) -> None:
        """Load a file; see `open_backend`."""
        if device not in ("auto", "cpu"):
            raise InputError(
                f"{path} was made for OpenVINO on a CPU and cannot run on --device {device}. Use --device cpu, or the float32 file."
            )
        openvino = import_openvino()
        self._path = path
        # On a CPU with bfloat16 the plugin would compute float layers in it unasked, and change some labels.
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._core = openvino.Core()
        try:
            # `read_model` would try its other formats on a damaged file, each with its own complaints on the terminal.
            frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
            self._model = frontend.convert(frontend.load(str(path)))
            compiled = self._core.compile_model(self._model, "CPU", self._settings)
        except Exception as error:  # its errors share no base class
            raise InputError(
                f"{path} is no ONNX file that OpenVINO {openvino.__version__} can load, or it is damaged: "
                f"{_reason(error).rstrip('.')}. Export or copy it again."
            ) from error
        self.metadata = _read_metadata(self._model, path)
        self.name, self.device = "openvino CPU", "cpu"
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        self.check_frames(frames_NHWC)
        with self._lock:
            try:
                outputs = self._request.infer(
                    [np.ascontiguousarray(frames_NHWC)], share_inputs=True, share_outputs=True
                )
            except Exception as error:  # its errors share no base class
                height, width = frames_NHWC.shape[1:3]
                raise InputError(f"{self._path} cannot run on frames of {height}x{width}: {_reason(error)}") from error
            return np.array(outputs[0], dtype=np.uint8)

    def time_stages(self, batches_NHWC: Sequence[UInt8Array]) -> dict[str, float]:
        # Counting slows it down, so it gets a network of its own.
        request = self._core.compile_model(
            self._model, "CPU", self._settings | {"PERF_COUNT": True}
        ).create_infer_request()
        runs = []
        for batch in batches_NHWC:
            request.infer([batch], share_inputs=True)
            runs.append(stages([(p.node_type, p.real_time.total_seconds() * 1000) for p in request.profiling_info]))
        return median_stages(runs)


def _reason(error: Exception) -> str:
    """Return the last line of a message of OpenVINO's, which begins with places in its own source."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


def _read_metadata(model: Any, path: Path) -> Metadata:
    place = ["framework", ONNX_KEY]
    ours = len(model.inputs) == len(model.outputs) == 1 and model.has_rt_info(place)
    return Metadata.from_onnx(str(model.get_rt_info(place).value) if ours else None, origin=path)
