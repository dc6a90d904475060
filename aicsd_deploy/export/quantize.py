"""An exported ONNX file with INT8 weights and activations: explicit Q/DQ pairs, made with onnxruntime.quantization."""

from __future__ import annotations

import inspect
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from aicsd_deploy.console import quiet_loggers
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.export.cpu_graph import (
    PIXEL_ZERO,
    PIXELS,
    end_channels_last,
    end_in_a_row,
    fold_preprocessing,
    read_pixels_directly,
)
from aicsd_deploy.export.precision import not_plain
from aicsd_deploy.metadata import ONNX_KEY, Metadata, command_line
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.runtime.frames import as_input
from aicsd_deploy.runtime.openvino_backend import import_openvino

Target = Literal["cpu", "openvino", "tensorrt", "both"]
TARGETS: tuple[Target, ...] = ("cpu", "openvino", "tensorrt", "both")
METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
"""How the range of an activation is chosen from what calibration frames gave: all of it, the least information lost, or
all but the outermost 0.001 %."""

# Weights keep all eight bits. CPUs without VNNI add two products in 16 bits and saturate now and then, which 7-bit weights
# would rule out, but those lost ten times as much on MobileNetV2 (docs/results/int8.md); the proof runs where the file is made.

_LAYERS = ["Conv", "MatMul", "Gemm"]
"""What has weights to quantise: convolutions and linear layers. Products of two activations, as in attention, stay in float."""
# Whole chains stay in eight bits: where one operator between two convolutions is left in float, ONNX Runtime converts its
# input and its output, which costs more than the operator.
_CHAINS = [*_LAYERS, "Add", "Mul", "Concat", "Clip", "Relu", "MaxPool", "GlobalAveragePool"]


@dataclass(frozen=True)
class Recipe:
    """What a target's fastest or only accepted form of Q/DQ is.

    Attributes:
        operators: operator types that are quantised.
        activation_type: QUInt8 lets ONNX Runtime's integer kernels fuse the activation into the range; TensorRT reads QInt8 only.
        options: `extra_options` of `quantize_static`.
        on_pixels: the graph is first rewritten so that the first convolution reads uint8 pixels.
        end: rewrites the end of the graph as is quickest there.
    """

    operators: list[str]
    activation_type: QuantType
    options: dict[str, Any]
    on_pixels: bool = False
    end: Callable[[onnx.ModelProto], None] | None = None


# TensorRT's parser takes symmetric ranges, no quantised bias, and no Q/DQ pair that two quantised layers share (what stays in
# float beside one, such as the addition of a residual block, may read it). Only what layers read is rounded: a pair between a
# convolution and its activation would keep TensorRT from fusing the two.
_SYMMETRIC = {
    "ActivationSymmetric": True,
    "QuantizeBias": False,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": _LAYERS,
}
# One step of the first activation is one step of a pixel, so that the pixels need no conversion.
_PIXEL_RANGE = {
    PIXELS: [
        {"quant_type": QuantType.QUInt8, "scale": np.array(1, np.float32), "zero_point": np.array(PIXEL_ZERO, np.uint8)}
    ]
}
RECIPES: dict[Target, Recipe] = {
    "cpu": Recipe(
        _CHAINS, QuantType.QUInt8, {"TensorQuantOverrides": _PIXEL_RANGE}, on_pixels=True, end=end_channels_last
    ),
    "openvino": Recipe(_LAYERS, QuantType.QInt8, _SYMMETRIC, end=end_in_a_row),
    "tensorrt": Recipe(_LAYERS, QuantType.QInt8, _SYMMETRIC),
    "both": Recipe(_LAYERS, QuantType.QInt8, _SYMMETRIC),
}


class Quantizer:
    """Quantises one float file in several ways; what the calibration frames gave is worked out once per method.

    Attributes:
        layers: names of the convolutions and linear layers, in the order of the graph.
    """

    def __init__(self, source: Path, frames_bgr: Sequence[UInt8Array], *, target: Target) -> None:
        """Prepare a float file.

        Args:
            source: a file of export/to_onnx.py, float32.
            frames_bgr: real frames from the training set, uint8 (H, W, 3).
            target: what the result is for.

        Raises:
            InputError: the file is quantised already, or cannot be quantised for this target.
            MissingDependencyError: ONNX Runtime is too old, or OpenVINO is the target and not installed.
        """
        if "calibration_cache_path" not in inspect.signature(quantize_static).parameters:
            raise MissingDependencyError("INT8 needs ONNX Runtime 1.32 or newer: pip install -U onnxruntime")
        if target == "openvino":
            import_openvino()  # the proof needs it: say so before anything takes time
        self.target, self._recipe = target, RECIPES[target]
        model = onnx.load(source)
        text = next((entry.value for entry in model.metadata_props if entry.key == ONNX_KEY), None)
        self.metadata = Metadata.from_onnx(text, origin=source)
        if (found := not_plain(model)) is not None:
            raise InputError(f"{source} {found}. Give the float32 file that export/to_onnx.py wrote.")
        self._input = model.graph.input[0].name
        self._frames = [as_input(frame, self.metadata) for frame in frames_bgr]
        if self._recipe.on_pixels:
            fold_preprocessing(model, self.metadata)
        if self._recipe.end is not None:
            self._recipe.end(model)
        constants = {tensor.name for tensor in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type in _LAYERS]
        self.layers = [node.name for node in products if node.input[1] in constants]
        self._of_activations = [node.name for node in products if node.input[1] not in constants]
        if not self.layers:
            raise InputError(
                f"{source} has no convolution and no linear layer, and nothing else is quantised here. Use it as it is."
            )
        self._scratch = tempfile.TemporaryDirectory(prefix="aicsd.int8.")
        self._source = Path(self._scratch.name) / "float.onnx"
        onnx.save_model(model, str(self._source))

    def close(self) -> None:
        """Remove the scratch files."""
        self._scratch.cleanup()

    def write(self, path: Path, *, method: str, float_layers: Sequence[str] = (), notes: dict[str, str]) -> None:
        """Write the quantised file.

        Args:
            path: where to.
            method: a key of `METHODS`.
            float_layers: layers that are left in float32.
            notes: what else the file's provenance is to say.
        """
        recipe = self._recipe
        # It prints, and advises to preprocess the graph, which fails on dynamic sizes.
        with redirect_stdout(io.StringIO()), quiet_loggers(""):
            quantize_static(
                self._source,
                path,
                _Reader(self._input, self._frames),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=recipe.operators,
                per_channel=True,
                activation_type=recipe.activation_type,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*float_layers, *self._of_activations],
                calibrate_method=METHODS[method],
                calibration_cache_path=Path(self._scratch.name) / f"{method}.json",
                extra_options=recipe.options
                | {
                    "CalibTensorRangeSymmetric": bool(recipe.options.get("ActivationSymmetric")),
                    "CalibStridedMinMax": 1,  # one frame at a time: every activation of every frame would fill the memory
                },
            )
        model = onnx.load(path)
        if recipe.on_pixels and self.layers[0] not in float_layers:
            read_pixels_directly(model)
        made = {"int8_target": self.target, "int8_calibration": method, "int8_command": command_line()}
        provenance = self.metadata.provenance | notes | made
        metadata = self.metadata.replace(precision="int8", provenance=provenance)
        others = {entry.key: entry.value for entry in model.metadata_props}
        onnx.helper.set_model_props(model, others | {ONNX_KEY: json.dumps(metadata.to_dict())})
        onnx.checker.check_model(model)
        onnx.save_model(model, str(path))


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Hands the frames to the calibrator, all or a range of them at a time."""

    def __init__(self, name: str, frames_NHWC: Sequence[UInt8Array]) -> None:
        self._name, self._frames = name, frames_NHWC
        self.set_range(0, len(frames_NHWC))

    def __len__(self) -> int:
        return len(self._frames)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left: Iterator[UInt8Array] = iter(self._frames[start_index:end_index])

    def get_next(self) -> dict[str, UInt8Array] | None:
        frame = next(self._left, None)
        return None if frame is None else {self._name: frame}
