"""What must hold before and after an engine is built: the graph, the shapes and the precision fit what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.export.precision import not_plain
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
        if (found := not_plain(model)) is not None:
            raise InputError(f"{path} {found}. Give the float32 file that export/to_onnx.py wrote.")
        return
    points = [initializers[node.input[2]] for node in pairs if len(node.input) > 2 and node.input[2] in initializers]
    kinds = {point.data_type for point in points}
    how = {
        "int8": "Quantise the float32 file for TensorRT: "
        f"python export/to_int8.py {'FLOAT32.onnx' if not_plain(model) else path} --target tensorrt",
        "fp8": "This toolkit makes no float8 files; NVIDIA's Model Optimizer does",
    }[precision]
    wanted = {"int8": {TensorProto.INT8}, "fp8": {TensorProto.FLOAT8E4M3FN}}[precision]
    if not pairs:
        raise InputError(
            f"{path} has no Q/DQ nodes, and --{precision} was asked for: there is nothing to take the scales from. {how}."
        )
    if (
        any(map(_is_unsigned, pairs))
        or TensorProto.UINT8 in kinds
        or any(np.any(numpy_helper.to_array(p).astype(np.float32) != 0) for p in points)
    ):
        raise InputError(
            f"{path} is quantised asymmetrically (zero points other than 0, or unsigned values), as ONNX Runtime's defaults do; "
            f"TensorRT takes symmetric int8 only. {how}."
        )
    if TensorProto.INT32 in kinds:
        raise InputError(f"{path} quantises its biases, which TensorRT does not take. {how}.")
    if not kinds <= wanted:
        raise InputError(f"{path} is not quantised to {precision} (--{precision}): it holds {', '.join(sorted(TensorProto.DataType.Name(k) for k in kinds))}. {how}.")  # fmt: skip


def require_own_contract(model: onnx.ModelProto, metadata: Metadata, path: Path) -> None:
    """Raise InputError unless a graph takes frames of the shape that its metadata say, and gives uint8 labels."""
    frames, labels = model.graph.input[0].type.tensor_type, model.graph.output[0].type.tensor_type
    found = tuple(extent.dim_value or None for extent in frames.shape.dim)
    if found != (*_fixed_extents(metadata), 3) or labels.elem_type != TensorProto.UINT8:
        raise InputError(
            f"{path} takes frames NxHxWxC {_text(found)} and gives {TensorProto.DataType.Name(labels.elem_type)} labels, but its "
            f"metadata say {_text((*_fixed_extents(metadata), 3))} and UINT8: it was changed after its export. Export it again with "
            "export/to_onnx.py, whose --image-size and --dynamic say what it takes."
        )


def require_fitting_reference(reference: Metadata, metadata: Metadata, path: Path) -> None:
    """Raise InputError unless the reference has the same classes, and takes the frames that the engine will take."""
    if reference.classes != metadata.classes:
        raise InputError(
            f"--reference {path} has other classes than the ONNX file. Give the checkpoint it was exported from."
        )
    any_size = "size" in reference.dynamic
    same_size = reference.image_size_hw == metadata.image_size_hw and "size" not in metadata.dynamic
    if reference.channel_order != metadata.channel_order or not (any_size or same_size):
        raise InputError(
            f"--reference {path} takes other frames (NxHxW {_text(_fixed_extents(reference))}, {reference.channel_order}) than the "
            f"ONNX file ({_text(_fixed_extents(metadata))}, {metadata.channel_order}). Give the checkpoint, or export it with the same "
            "--image-size, --channels and --dynamic."
        )


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
    fixed = _fixed_extents(metadata)
    for profile in profiles:
        text = " ".join("x".join(map(str, shape)) for shape in profile)
        if any(not low <= usual <= high for low, usual, high in zip(*profile, strict=True)):
            raise InputError(f"--profile {text}: give the smallest, the usual and the largest shape, in this order.")
        if any(f is not None and extent != f for shape in profile for f, extent in zip(fixed, shape, strict=True)):
            raise InputError(
                f"--profile {text}: this file takes NxHxW {_text(fixed)}. Export it with "
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


def _fixed_extents(metadata: Metadata) -> tuple[int | None, int | None, int | None]:
    """Return N, H and W of the frames that an artefact takes; None for any."""
    height, width = metadata.image_size_hw
    size = (None, None) if "size" in metadata.dynamic else (height, width)
    return (None if "batch" in metadata.dynamic else 1, *size)


def _text(extents: Sequence[int | None]) -> str:
    return "x".join("any" if extent is None else str(extent) for extent in extents)


def _is_unsigned(node: onnx.NodeProto) -> bool:
    """Say whether a node quantises to uint8, as ONNX has it where neither zero point nor type is given."""
    kind = next((entry.i for entry in node.attribute if entry.name == "output_dtype"), TensorProto.UNDEFINED)
    unsigned = kind in (TensorProto.UNDEFINED, TensorProto.UINT8)
    return node.op_type == "QuantizeLinear" and not any(node.input[2:]) and unsigned
