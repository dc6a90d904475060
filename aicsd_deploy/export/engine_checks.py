"""What must hold before and after an engine is built: the graph, the shapes and the precision fit what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.export.tensorrt_build import PrecisionFound, Profile
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.runtime.engine_card import holds

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


def require_fitting_graph(model: onnx.ModelProto, precision: Precision, path: Path) -> None:
    """Raise InputError unless a graph is quantised exactly when a quantised precision is asked for, and as TensorRT takes it."""
    initializers = {i.name: i for i in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if precision not in ("int8", "fp8"):
        if pairs:
            raise InputError(
                f"{path} is quantised (it has {len(pairs)} Q/DQ nodes), and --{precision} was asked for. Build it with --int8."
            )
        return
    points = [initializers[node.input[2]] for node in pairs if len(node.input) > 2 and node.input[2] in initializers]
    kinds = {point.data_type for point in points}
    how = "Quantise it for TensorRT: python export/to_int8.py --target tensorrt"
    wanted = {"int8": {TensorProto.INT8}, "fp8": {TensorProto.FLOAT8E4M3FN}}[precision]
    if not pairs:
        raise InputError(
            f"{path} is not quantised, and --{precision} was asked for: there is nothing to take the scales from. {how}."
        )
    if TensorProto.UINT8 in kinds or any(np.any(numpy_helper.to_array(p).astype(np.float32) != 0) for p in points):
        raise InputError(
            f"{path} is quantised asymmetrically (zero points other than 0, or unsigned values), as ONNX Runtime's defaults do; "
            f"TensorRT takes symmetric int8 only. {how}."
        )
    if TensorProto.INT32 in kinds:
        raise InputError(f"{path} quantises its biases, which TensorRT does not take. {how}.")
    if not kinds <= wanted:
        raise InputError(f"{path} is not quantised to {precision} (--{precision}): it holds {', '.join(sorted(TensorProto.DataType.Name(k) for k in kinds))}. {how}.")  # fmt: skip


def usual_profile(metadata: Metadata) -> Profile:
    """Return the shapes that an engine is built for when nothing is said: batches to 8, sizes from half to one and a half."""
    height, width = metadata.image_size_hw
    factors = (0.5, 1.0, 1.5) if "size" in metadata.dynamic else (1.0, 1.0, 1.0)
    batches = (1, 1, 8) if "batch" in metadata.dynamic else (1, 1, 1)
    low, usual, high = (
        (
            n,
            height if f == 1 else 32 * max(1, round(height * f / 32)),
            width if f == 1 else 32 * max(1, round(width * f / 32)),
        )
        for n, f in zip(batches, factors, strict=True)
    )
    return (low, usual, high)


def require_fitting_profiles(profiles: Sequence[Profile], metadata: Metadata) -> None:
    """Raise InputError unless profiles range only over what the graph leaves open, in order, and one holds a single frame."""
    fixed = (None if "batch" in metadata.dynamic else 1, *(metadata.image_size_hw if "size" not in metadata.dynamic else (None, None)))  # fmt: skip
    for profile in profiles:
        text = " ".join("x".join(map(str, shape)) for shape in profile)
        if any(not low <= usual <= high for low, usual, high in zip(*profile, strict=True)):
            raise InputError(f"--profile {text}: give the smallest, the usual and the largest shape, in this order.")
        if any(f is not None and extent != f for shape in profile for f, extent in zip(fixed, shape, strict=True)):
            raise InputError(
                f"--profile {text}: this file takes NxHxW {'x'.join('any' if f is None else str(f) for f in fixed)}. Export it with "
                "--dynamic batch size to leave more open."
            )
    frame = (1, *metadata.image_size_hw)
    if profiles and not any(holds(profile, frame) for profile in profiles):
        raise InputError(
            f"No --profile holds {'x'.join(map(str, frame))}, a single frame of the size that the file works on, so that this "
            "toolkit could not run the engine. Add a profile that does, or export the file with another --image-size."
        )


def require_precision(found: PrecisionFound, asked: Precision, what: str) -> None:
    """Raise VerificationError unless most weights are stored, and most weighted layers compute, in what was asked for."""
    share = found.share(asked)
    layers = found.weighted_layers.get(asked, 0) / max(1, sum(found.weighted_layers.values()))
    if min(share, layers) < 0.5:
        raise VerificationError(
            f"{what} is not the {asked} engine that was asked for: {100 * share:.0f} % of its weights and {100 * layers:.0f} % of its "
            f"weighted layers are {asked} (found: {found.weights}). It was not kept. Use the precision that it can hold, or report the "
            "network."
        )
