"""Weights and arithmetic of an ONNX file, counted on its graph."""

from __future__ import annotations

from math import prod
from pathlib import Path

from aicsd_deploy.bench.footprint import Work
from aicsd_deploy.metadata import ONNX_KEY, Metadata

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def onnx_work(path: Path) -> Work:
    """Count what one frame of the file's own size costs; see `Work`."""
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
    weights: dict[str, int] = {}
    for node in graph.node:
        if node.op_type not in _LAYERS:
            continue
        taken, weight, given = (sizes.get(name, ()) for name in (*node.input[:2], node.output[0]))
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
    return Work(sum(weights.values()), flops / 1e9, traffic / 1e6)
