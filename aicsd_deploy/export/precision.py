"""Number formats baked into an ONNX graph: what TensorRT builds is what the graph says.

TensorRT 11 and TensorRT-RTX take no precision flags; TensorRT 10 follows the graph as well when a network is strongly typed.
So a float32 graph is rewritten: weights stored in float16 or bfloat16, casts only where the two formats meet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from aicsd_deploy.errors import InputError

Half = Literal["fp16", "bf16"]
BF16_OPSET = 22
"""The first operator set whose convolutions and poolings take bfloat16."""
HALF_SCALES_OPSET = 19
"""The first operator set that can dequantise to half precision."""

_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_NUMPY: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_FIRST = ("Conv", "ConvTranspose", "Gemm", "MatMul", "DequantizeLinear")
"""From these on the graph runs in half precision. What is dequantised takes the type of its scale."""
_FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that the operator takes in float32 only."""
_NOT_IN_BF16 = ("ConvTranspose", "HardSwish", "Mish")
"""Operators that ONNX has in bfloat16 and TensorRT-RTX 1.7 refuses."""
_UNTOUCHED = (
    "Cast",
    "CastLike",
    "Shape",
    "Size",
    "If",
    "Loop",
    "Scan",
    "ConstantOfShape",
)


@dataclass(frozen=True)
class HalfGraph:
    """A graph in half precision.

    Attributes:
        model: the graph.
        low: names of the nodes that run in half precision.
    """

    model: onnx.ModelProto
    low: tuple[str, ...]


def to_half(model: onnx.ModelProto, half: Half, *, keep: Collection[str] = (), emulate: bool = False) -> HalfGraph:
    """Rewrite a float32 graph for half precision.

    What comes before the first convolution (the normalisation of the frames) stays in float32: it is next to free there, and
    bfloat16 cannot hold its constants well.

    Args:
        model: a float32 graph; it is not changed.
        half: "fp16" or "bf16"; bf16 lifts the graph to operator set 22, fp16 one with Q/DQ pairs to 19.
        keep: names of nodes to leave in float32.
        emulate: keep every tensor in float32 but round it to what `half` can hold. For runtimes without kernels for it.

    Returns:
        The graph; its inputs and outputs keep their types.

    Raises:
        InputError: the graph cannot be lifted to the operator set that bf16 needs, or is no valid graph.
    """
    if not emulate:
        model = _at_least(model, opset_for(model, half), half)
    model = with_constants_as_initializers(model)
    rewriter = _Rewriter(model, half, frozenset(keep), emulate)
    rewriter.run()
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            f"This graph cannot be written in {half}: {error}. Build it with --fp32, and report the network."
        ) from error
    return HalfGraph(model, tuple(rewriter.low))


def not_plain(model: onnx.ModelProto) -> str | None:
    """Say what keeps a graph from being one of float32 in operators of ONNX, which all rewriting starts from; None if nothing does."""
    own = sorted({node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if any("Quantize" in node.op_type or node.op_type.endswith("Integer") for node in model.graph.node):
        return "is quantised already"
    if own:
        return f"has operators that are not ONNX's ({', '.join(own[:3])}), such as ONNX Runtime's optimizer writes"
    if any(tensor.data_type in _TYPES.values() for tensor in model.graph.initializer):
        return "has weights in half precision already"
    return None


def opset_for(model: onnx.ModelProto, half: Half) -> int:
    """Return the operator set that a graph has in a half format: its own, or the first that has what is needed."""
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    return max(_opset(model), BF16_OPSET if half == "bf16" else HALF_SCALES_OPSET if quantized else 0)


def exists_in(node: onnx.NodeProto, half: Half, *, opset: int, types: Mapping[str, int]) -> bool:
    """Return whether an operator takes a half format, in ONNX and in TensorRT, for all of its float32 inputs (`types`)."""
    if half == "bf16" and node.op_type in _NOT_IN_BF16:
        return False
    if not onnx.defs.has(node.op_type, node.domain):
        return True  # nothing is known
    formal = onnx.defs.get_schema(node.op_type, opset, node.domain).inputs
    wanted = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[half]
    return all(
        wanted in formal[min(i, len(formal) - 1)].types  # the last may stand for many
        for i, name in enumerate(node.input)
        if types.get(name) == TensorProto.FLOAT and i not in _FLOAT_INPUTS.get(node.op_type, ())
    )


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type (TensorProto.DataType) of every tensor of a graph whose type can be inferred."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in inferred.initializer}


def float_candidates(model: onnx.ModelProto, types: Mapping[str, int]) -> list[onnx.NodeProto]:
    """Return the nodes that could run in half precision: those with float32 inputs, from the first weighted node on."""
    after_weights: set[str] = set()
    found = []
    for node in model.graph.node:
        floats = [name for name in node.input if types.get(name) == TensorProto.FLOAT]
        if not floats or node.op_type in _UNTOUCHED:
            continue
        if node.op_type in _FIRST or not after_weights.isdisjoint(floats):
            found.append(node)
            after_weights.update(node.output)
    return found


def with_constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph whose Constant nodes have become initializers, and whose nodes all have names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = list(copy.graph.node)
    for node in nodes:
        node.name = node.name or f"node_of_{node.output[0]}"
    del copy.graph.node[:]
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = copy.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            copy.graph.node.append(node)
    return copy


def drop_unused_constants(graph: onnx.GraphProto) -> None:
    """Remove, in place, the initializers that nothing reads."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    remaining = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(remaining)


def _opset(model: onnx.ModelProto) -> int:
    return int(next(entry.version for entry in model.opset_import if not entry.domain))


def _at_least(model: onnx.ModelProto, opset: int, half: Half) -> onnx.ModelProto:
    found = _opset(model)
    if found >= opset:
        return model
    try:
        lifted = onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # a C++ exception without a class of its own
        raise InputError(
            f"This graph needs ONNX operator set {opset} for {half}, and cannot be lifted from set {found}: {error}. "
            f"Export it with: python export/to_onnx.py CHECKPOINT.pt --opset {opset}"
        ) from error
    del lifted.metadata_props[:]
    lifted.metadata_props.extend(model.metadata_props)
    return lifted


class _Rewriter:
    """Walks a graph in its order and gives every tensor that a half-precision node reads or writes its new type."""

    def __init__(self, model: onnx.ModelProto, half: Half, keep: frozenset[str], emulate: bool) -> None:
        self.graph, self.half, self.keep, self.emulate = model.graph, half, keep, emulate
        self.types = tensor_types(model)
        self.candidates = {node.name for node in float_candidates(model, self.types)}
        self.weights = {i.name: i for i in self.graph.initializer}
        self.half_tensors: set[str] = set()
        self.made: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.low: list[str] = []

    def run(self) -> None:
        outputs = {output.name for output in self.graph.output}
        for node in list(self.graph.node):
            if node.name in self.candidates and node.name not in self.keep:
                self.low.append(node.name)
                self._lower(node, outputs)
            else:
                for i, name in enumerate(node.input):
                    if name in self.half_tensors:
                        node.input[i] = self._cast(name, TensorProto.FLOAT)
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        drop_unused_constants(self.graph)
        del self.graph.value_info[:]

    def _lower(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        for i, name in enumerate(node.input):
            if self.types.get(name) != TensorProto.FLOAT or i in _FLOAT_INPUTS.get(node.op_type, ()):
                continue
            if name in self.weights:
                scale = i == 1 and node.op_type in ("QuantizeLinear", "DequantizeLinear")
                node.input[i] = self._half_weight(name, positive=scale)
            elif name not in self.half_tensors:
                node.input[i] = self._to_half(name)
        self.nodes.append(node)
        for i, name in enumerate(node.output):
            if self.types.get(name) != TensorProto.FLOAT:
                continue
            if name in outputs or self.emulate:
                # Its readers find the value under the old name: as float32, rounded.
                node.output[i] = f"{name}_{self.half}"
                if self.emulate:
                    self._emit(node.output[i], f"{name}_rounded", _TYPES[self.half])
                    self._emit(f"{name}_rounded", name, TensorProto.FLOAT)
                else:
                    self._emit(node.output[i], name, TensorProto.FLOAT)
            else:
                self.half_tensors.add(name)

    def _half_weight(self, name: str, *, positive: bool) -> str:
        """Store a weight in half precision; the scale of a channel that is nearly dead must not become 0."""
        new = f"{name}_{self.half}"
        if new not in self.made:
            rounded = _rounded(numpy_helper.to_array(self.weights[name]), self.half)
            if positive and self.half == "fp16":
                rounded = np.maximum(rounded, np.finfo(np.float16).smallest_subnormal)
            stored = rounded.astype(np.float32) if self.emulate else rounded
            self.graph.initializer.append(numpy_helper.from_array(stored, new))
            self.made.add(new)
        return new

    def _to_half(self, name: str) -> str:
        low = self._cast(name, _TYPES[self.half])
        return self._cast(low, TensorProto.FLOAT) if self.emulate else low

    def _cast(self, name: str, to: int) -> str:
        cast = f"{name}_as_{helper.tensor_dtype_to_np_dtype(to).name}"
        if cast not in self.made:
            self.made.add(cast)
            self._emit(name, cast, to)
        return cast

    def _emit(self, source: str, target: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to))


def rounding_error(values: npt.NDArray[np.float32], half: Half) -> float:
    """Return the L2 norm of what weights lose in a half format; infinite where one overflows."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        error = l2_norm(_rounded(values, half).astype(np.float32) - values)
    return error if np.isfinite(error) else float("inf")


def l2_norm(values: npt.NDArray[Any]) -> float:
    """Return the L2 norm; summed in float64, since squares of large numbers leave the range of float32."""
    return float(np.linalg.norm(values.astype(np.float64)))


def _rounded(values: npt.NDArray[np.float32], half: Half) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        rounded: npt.NDArray[Any] = values.astype(_NUMPY[half])
    return rounded
