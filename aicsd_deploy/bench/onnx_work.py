"""Weights and arithmetic of an ONNX file, counted on its graph."""

from __future__ import annotations

from math import prod
from pathlib import Path

from aicsd_deploy.bench.footprint import Work
from aicsd_deploy.metadata import ONNX_KEY, Metadata

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NOT_COUNTED = {"Attention", "DeformConv", "Einsum"}
"""Products too, with which the arithmetic of the others would be called that of all."""


def onnx_work(path: Path) -> Work:
    """Count what one frame of the file's own size costs; see `Work`.

    Only the weights are counted where the size of a layer cannot be inferred, as in attention whose graph computes its sizes.
    """
    import onnx  # a device that runs artefacts need not have it

    model = onnx.load(path)
    text = next((entry.value for entry in model.metadata_props if entry.key == ONNX_KEY), None)
    frame_NHWC = (1, *Metadata.from_onnx(text, origin=path).image_size_hw, 3)
    for dim, extent in zip(model.graph.input[0].type.tensor_type.shape.dim, frame_NHWC, strict=True):
        dim.dim_value = extent  # also where batch or size are free
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    sizes: dict[str, tuple[int, ...]] = {name: tuple(tensor.dims) for name, tensor in tensors.items()}
    for value in (*graph.value_info, *graph.input, *graph.output):
        sizes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    origin = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}

    def nbytes(name: str) -> int:
        return prod(sizes.get(name, (0,))) * (1 if name in origin else 4)

    flops = traffic = 0
    all_known = _NOT_COUNTED.isdisjoint(node.op_type for node in graph.node)
    weights: dict[str, int] = {}
    for node in graph.node:
        if node.op_type not in _LAYERS:
            continue
        taken, weight, given = (sizes.get(name, ()) for name in (*node.input[:2], node.output[0]))
        all_known = all_known and all(size and 0 not in size for size in (taken, weight, given))
        if node.op_type == "ConvTranspose":
            flops += 2 * prod(taken) * prod(weight[1:])
        elif len(weight) > 1:
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            summed = prod(weight[1:]) if node.op_type == "Conv" else weight[-1 if transposed else -2]
            flops += 2 * prod(given) * summed
        traffic += sum(nbytes(name) for name in (*node.input, node.output[0]) if name)
        for name in node.input[1:]:
            source = origin.get(name, name)
            if source in tensors:
                weights[source] = prod(tensors[source].dims)
    parameters = sum(weights.values())
    return Work(parameters, flops / 1e9, traffic / 1e6) if all_known else Work(parameters)
