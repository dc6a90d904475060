"""Which nodes must stay in float32: those that have no half precision, and those whose values or weights it cannot hold.

The latter are found by measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aicsd_deploy.export.precision import (
    Half,
    exists_in,
    float_candidates,
    l2_norm,
    opset_for,
    rounding_error,
    tensor_types,
    with_constants_as_initializers,
)
from aicsd_deploy.runtime.base import UInt8Array

LARGEST = {"fp16": 65504 / 4, "bf16": 3.39e38 / 4}
"""Activations stay this far inside the range: real frames go beyond those that were measured."""
SMALLEST = {"fp16": 6.1e-5, "bf16": 1.2e-38}
"""The smallest number that is held with all its digits."""


MAX_WEIGHT_ERROR = 0.01
"""Largest error of rounded weights, relative to their size (L2 norms)."""


def nodes_to_keep(model: onnx.ModelProto, half: Half, frames_NHWC: Sequence[UInt8Array]) -> dict[str, str]:
    """Run a float32 graph on frames and find the nodes that half precision would spoil.

    Args:
        model: a float32 graph with one uint8 input.
        half: the format it is to be converted to.
        frames_NHWC: calibration frames, each a batch as the graph takes it.

    Returns:
        The reason for each node that must stay in float32, by its name.
    """
    model = with_constants_as_initializers(model)
    types = tensor_types(model)
    candidates = float_candidates(model, types)
    opset = opset_for(model, half)
    found = {
        node.name: f"there is no {node.op_type} in {half}"
        for node in candidates
        if not exists_in(node, half, opset=opset, types=types)
    }
    weights = {i.name: i for i in model.graph.initializer}
    watched = {
        name
        for node in candidates
        for name in (*node.input, *node.output)
        if types.get(name) == TensorProto.FLOAT and name not in weights
    }
    peaks = _peaks(model, sorted(watched), frames_NHWC)
    for node in candidates:
        for i, name in enumerate((*node.input, *node.output)):
            if name in weights:
                is_bias = i == 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm")
                reason = _weights_reason(weights[name], half, peaks.get(node.output[0], 0.0) if is_bias else None)
            else:
                reason = _values_reason(peaks.get(name), half)
            if reason is not None:
                found.setdefault(node.name, reason)
    return found


def layer_errors(
    reference: onnx.ModelProto, candidate: onnx.ModelProto, frames_NHWC: Sequence[UInt8Array]
) -> dict[str, float]:
    """Compare two forms of one graph layer by layer.

    Returns:
        For each node whose output both have, the error that it adds: the relative L2 error of its output less the largest of its
        inputs', worst first.
    """
    reference = with_constants_as_initializers(reference)
    shared = set(_float_outputs(reference)) & set(_float_outputs(candidate))
    names = sorted(shared)
    totals = dict.fromkeys(names, 0.0)
    for left, right in zip(_run(reference, names, frames_NHWC), _run(candidate, names, frames_NHWC), strict=True):
        for name in names:
            size = l2_norm(left[name]) or 1.0
            error = l2_norm(right[name].astype(np.float32) - left[name]) / size
            totals[name] += (error if np.isfinite(error) else 1e6) / len(frames_NHWC)
    added = {}
    for node in reference.graph.node:
        if node.output[0] in totals:
            before = max((totals.get(name, 0.0) for name in node.input), default=0.0)
            added[node.name] = totals[node.output[0]] - before
    return dict(sorted(added.items(), key=lambda item: -item[1]))


def _weights_reason(weights: TensorProto, half: Half, output_peak: float | None) -> str | None:
    """Judge weights by their own size, and a bias (`output_peak` given) by that of what it is added to."""
    if weights.data_type != TensorProto.FLOAT:
        return None
    values = numpy_helper.to_array(weights)
    error = rounding_error(values, half)
    size = l2_norm(values) if output_peak is None else max(output_peak, l2_norm(values))
    return (
        None
        if error <= MAX_WEIGHT_ERROR * size
        else f"its weights (up to {np.abs(values).max():.3g}) do not fit {half}"
    )


def _values_reason(peak: float | None, half: Half) -> str | None:
    if peak is None:
        return None
    if peak > LARGEST[half]:
        return f"its values reach {peak:.3g}"
    return f"its values are at most {peak:.3g}" if 0 < peak < SMALLEST[half] else None


def _peaks(model: onnx.ModelProto, names: Sequence[str], frames_NHWC: Sequence[UInt8Array]) -> dict[str, float]:
    peaks = dict.fromkeys(names, 0.0)
    for values in _run(model, names, frames_NHWC):
        for name in names:
            peak = float(np.abs(values[name]).max()) if values[name].size else 0.0
            peaks[name] = max(peaks[name], peak) if np.isfinite(peak) else float("inf")  # NaN as well
    return peaks


def _float_outputs(model: onnx.ModelProto) -> list[str]:
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16)
    types = tensor_types(model)
    return [name for node in model.graph.node for name in node.output if types.get(name) in kinds]


def _run(
    model: onnx.ModelProto, names: Sequence[str], frames_NHWC: Sequence[UInt8Array]
) -> Iterator[dict[str, np.ndarray]]:
    """Run a graph in ONNX Runtime on the CPU and yield the tensors of these names for every batch of frames."""
    import onnxruntime as ort

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    types = tensor_types(model)
    probe.graph.output.extend(helper.make_tensor_value_info(name, types[name], None) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with TemporaryDirectory() as folder:  # a file, since a graph above 2 GB fits no message
        path = Path(folder) / "probe.onnx"
        onnx.save_model(probe, str(path))
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for batch in frames_NHWC:
            yield dict(zip(names, session.run(list(names), {model.graph.input[0].name: batch}), strict=True))
