"""Runs an exported .onnx file in ONNX Runtime."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from aicsd_deploy.errors import InputError, MissingDependencyError, first_line
from aicsd_deploy.metadata import ONNX_KEY, Metadata
from aicsd_deploy.runtime.base import Backend, UInt8Array, median_stages
from aicsd_deploy.runtime.driver import gpu_index
from aicsd_deploy.runtime.operators import stages
from aicsd_deploy.runtime.ort_profile import profile

DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]
"""It quantises, per tensor and without calibration, layers that an INT8 file leaves in float: a file that labels 97 % of the
pixels as the float32 one does was at 21 % with it (onnxruntime 1.32)."""


class OrtBackend(Backend):
    """An ONNX file in ONNX Runtime, on its CPU or CUDA provider; which of them runs is never left to chance."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        disabled: Sequence[str] = DISABLED_OPTIMIZERS,
    ) -> None:
        """Load a file; see `open_backend`. `disabled` names the optimizers of ONNX Runtime that are left out."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingDependencyError(
                f"Running {path} needs ONNX Runtime. Install it with: pip install 'aicsd-deploy[cpu]' (or [gpu])"
            ) from error
        self._path = path
        self._options = options = ort.SessionOptions()
        options.log_severity_level = 4  # what matters is raised below
        # Between runs its threads wait by spinning, for longer than a frame takes, on cores that others need: another session,
        # or the rest of a video's pipeline. Those of one that has nothing beside it lose nothing by stopping.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        self._providers = _providers(ort, device)
        self._disabled = list(disabled)
        try:
            self._session = self._open(ort)
        except Exception as error:  # its errors share no base class
            raise InputError(
                f"{path} is no ONNX file that ONNX Runtime {ort.__version__} can load, or it is damaged: "
                f"{first_line(error)}. Export or copy it again."
            ) from error
        self.device = self._device_in_use(asked=device)
        self.metadata = _read_metadata(self._session, path)
        if self.metadata.provenance.get("int8_target") == "tensorrt":
            # The CPU stands in for TensorRT here. Its own integer kernels saturate on 8-bit weights where it has no VNNI.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            self._session = self._open(ort)
        self.name = "onnxruntime " + self._session.get_providers()[0].removesuffix("ExecutionProvider")
        self._run: Callable[[UInt8Array], UInt8Array]
        if self.device == "cpu":
            name = self._session.get_inputs()[0].name
            self._run = lambda frames_NHWC: self._session.run(None, {name: frames_NHWC})[0]
        else:
            self._run = BoundRuns(ort, self._session, self.device)

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        self.check_frames(frames_NHWC)
        try:
            labels_NHW = self._run(frames_NHWC)
        except Exception as error:  # its errors share no base class
            height, width = frames_NHWC.shape[1:3]
            raise InputError(f"{self._path} cannot run on frames of {height}x{width}: {first_line(error)}.") from error
        return np.asarray(labels_NHW, dtype=np.uint8)

    def time_stages(self, batches_NHWC: Sequence[UInt8Array]) -> dict[str, float]:
        if self.device != "cpu":
            return {}  # its profiler then sees how long kernels take to launch, not how long they run
        runs = profile(self._path, self._options, self._providers, self._disabled, batches_NHWC)
        return median_stages([stages(run) for run in runs])

    def _open(self, ort: Any) -> Any:
        path, options, providers = str(self._path), self._options, self._providers
        try:
            return ort.InferenceSession(path, options, providers=providers, disabled_optimizers=self._disabled)
        except Exception as error:  # its errors share no base class
            if "clip_quantizelinear" not in str(error):
                raise
        # This optimiser fails on a Clip in front of a float8 QuantizeLinear (onnxruntime 1.32).
        self._disabled.append("ClipQuantRewrite")
        return ort.InferenceSession(path, options, providers=providers, disabled_optimizers=self._disabled)

    def _device_in_use(self, *, asked: str) -> str:
        """Return "cpu" or "cuda:N"; refuse the silent change to the CPU that ONNX Runtime makes when CUDA's libraries are missing."""
        first = self._session.get_providers()[0]
        if asked.startswith("cuda") and first != "CUDAExecutionProvider":
            raise MissingDependencyError(
                f"--device {asked}: ONNX Runtime could not start its CUDA provider and would run on the CPU instead. Its CUDA "
                "and cuDNN libraries or the driver are missing. Install 'aicsd-deploy[gpu]', or use --device cpu."
            )
        return f"cuda:{gpu_index(asked)}" if first == "CUDAExecutionProvider" else "cpu"


class BoundRuns:
    """Runs a session with its input in a place of its own on a device, so that nothing is allocated for a frame; one at a time."""

    def __init__(self, ort: Any, session: Any, device: str) -> None:
        self._ort, self._session = ort, session
        self._device, self._index = device.partition(":")[0], gpu_index(device)
        self._input, self._output = session.get_inputs()[0].name, session.get_outputs()[0].name
        self._place: Any = None
        self._lock = threading.Lock()

    def __call__(self, frames_NHWC: UInt8Array) -> UInt8Array:
        """Return the labels, uint8 (N, H, W)."""
        with self._lock:
            if self._place is None or tuple(self._place.shape()) != frames_NHWC.shape:
                self._place = self._ort.OrtValue.ortvalue_from_numpy(frames_NHWC, self._device, self._index)
                self._binding = self._session.io_binding()
                self._binding.bind_ortvalue_input(self._input, self._place)
                self._binding.bind_output(self._output, self._device, self._index)
            else:
                self._place.update_inplace(np.ascontiguousarray(frames_NHWC))
            self._session.run_with_iobinding(self._binding)
            return np.array(self._binding.copy_outputs_to_cpu()[0], dtype=np.uint8)


def _providers(ort: Any, device: str) -> list[Any]:
    cuda = ("CUDAExecutionProvider", {"device_id": str(gpu_index(device)), "use_tf32": "0"})  # float32 is float32
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device.startswith("cuda") and not has_cuda:
        raise MissingDependencyError(
            f"--device {device}: this ONNX Runtime ({ort.__version__}) is built for the CPU only. Uninstall onnxruntime and "
            "install 'aicsd-deploy[gpu]', or use --device cpu."
        )
    if device == "cpu" or not has_cuda:
        return ["CPUExecutionProvider"]
    if hasattr(ort, "preload_dlls"):
        # CUDA and cuDNN from pip lie where no loader looks. What is missing it prints; `_device_in_use` says it better.
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return [cuda, "CPUExecutionProvider"]


def _read_metadata(session: Any, path: Path) -> Metadata:
    text = session.get_modelmeta().custom_metadata_map.get(ONNX_KEY)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    ours = len(inputs) == len(outputs) == 1 and inputs[0].type == "tensor(uint8)"
    return Metadata.from_onnx(text if ours else None, origin=path)
