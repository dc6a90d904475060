"""The deployed graph rewritten for INT8 on a CPU: the first convolution reads the pixels, the end works as is quickest there.

A float normalisation before a quantised network costs more than several of its layers: 0.5 million multiplications and
additions, then a rounding back to eight bits. Pixels are eight-bit numbers already, so the normalisation and the channel
order go into the weights of the first convolution: w * ((p / 255 - mean) / std) = w / (255 std) * (p - zero) + constant.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aicsd_deploy.errors import InputError
from aicsd_deploy.export.precision import drop_unused_constants
from aicsd_deploy.metadata import Metadata

PIXELS = "aicsd_pixels"
"""The tensor that carries the pixel values, less `PIXEL_ZERO`, as float32 (N, 3, H, W) in the float form of the graph."""
PIXEL_ZERO = 114
"""Zero point of the pixels: what padding reads. It lies between the means of the three channels; the mean itself, which
padded normalised images hold, differs from channel to channel, so labels can differ by a pixel at the border."""
_FRAMES_NCHW = "aicsd_frames_nchw"


def fold_preprocessing(model: onnx.ModelProto, metadata: Metadata) -> None:
    """Put normalisation and channel order into the first convolution, in place.

    Raises:
        InputError: something else than the preprocessing of `DeployModule` stands before the first convolution.
    """
    graph = model.graph
    before, conv = _nodes_before_first_conv(graph, flipped=metadata.channel_order == "bgr")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weight = constants[conv.input[1]]
    bias = constants[conv.input[2]] if len(conv.input) > 2 else np.zeros(len(weight))
    mean, std = (np.asarray(values).reshape(1, 3, 1, 1) for values in (metadata.mean, metadata.std))
    on_pixels = weight / (255 * std)
    shifted = bias + (on_pixels * (PIXEL_ZERO - 255 * mean)).sum(axis=(1, 2, 3))
    if metadata.channel_order == "bgr":
        on_pixels = on_pixels[:, ::-1]
    # Under names of their own: other layers may share the old ones.
    conv.input[:] = [PIXELS, f"{PIXELS}_weight", f"{PIXELS}_bias"]
    for name, values in zip(conv.input[1:], (on_pixels, shifted), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
    for node in before:
        graph.node.remove(node)
    frames = graph.input[0].name
    graph.initializer.append(numpy_helper.from_array(np.array(PIXEL_ZERO, np.float32), f"{PIXELS}_zero"))
    for place, node in enumerate(
        (
            helper.make_node("Transpose", [frames], [_FRAMES_NCHW], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", [_FRAMES_NCHW], [f"{PIXELS}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Sub", [f"{PIXELS}_cast", f"{PIXELS}_zero"], [PIXELS]),
        )
    ):
        graph.node.insert(place, node)
    drop_unused_constants(graph)


def read_pixels_directly(model: onnx.ModelProto) -> None:
    """After quantisation: let the first convolution dequantise the uint8 frames themselves, in place."""
    graph = model.graph
    quantize = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == PIXELS)
    dequantize = next(node for node in graph.node if node.input and node.input[0] == quantize.output[0])
    dequantize.input[0] = _FRAMES_NCHW
    gone = [n for n in graph.node if n is quantize or n.output[0] in (PIXELS, f"{PIXELS}_cast")]
    for node in gone:
        graph.node.remove(node)
    drop_unused_constants(graph)


def end_channels_last(model: onnx.ModelProto) -> None:
    """Let the last upsampling and the argmax work on (N, H, W, C), in place: both are quicker there in ONNX Runtime.

    A graph whose end looks otherwise, or whose frames may have any size, is left as it is.
    """
    graph = model.graph
    argmax = _last_argmax(graph)
    resize = next((n for n in graph.node if argmax and n.op_type == "Resize" and n.output[0] == argmax.input[0]), None)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    if argmax is None or resize is None or len(resize.input) < 4 or resize.input[3] not in constants:
        return
    sizes = numpy_helper.to_array(constants[resize.input[3]])
    axis = next(attribute for attribute in argmax.attribute if attribute.name == "axis")
    readers = [name for node in graph.node for name in node.input].count(resize.output[0])
    if sizes.size != 4 or axis.i != 1 or readers != 1:
        return
    graph.initializer.append(numpy_helper.from_array(sizes[[0, 2, 3, 1]], "aicsd_sizes_nhwc"))
    transpose = helper.make_node("Transpose", [resize.input[0]], ["aicsd_logits_nhwc"], perm=[0, 2, 3, 1])
    graph.node.insert(list(graph.node).index(resize), transpose)
    resize.input[0], resize.input[3] = "aicsd_logits_nhwc", "aicsd_sizes_nhwc"
    axis.i = 3
    drop_unused_constants(graph)
    # The shapes that the exporter noted are those of the channels-first form.
    for value in [v for v in graph.value_info if v.name == resize.output[0]]:
        graph.value_info.remove(value)


def end_in_a_row(model: onnx.ModelProto) -> None:
    """Let the argmax work on (N, C, H * W), in place: OpenVINO then keeps the scores of a class together, and is ten times quicker.

    A graph whose end looks otherwise, or whose frames may have any size, is left as it is.
    """
    graph = model.graph
    argmax = _last_argmax(graph)
    labels_NHW = [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim]
    if argmax is None or len(labels_NHW) != 3 or 0 in labels_NHW:
        return
    rows, result = "aicsd_scores_in_a_row", argmax.output[0]
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1]), f"{rows}_shape"))
    graph.initializer.append(numpy_helper.from_array(np.array(labels_NHW), "aicsd_labels_shape"))
    place = list(graph.node).index(argmax)
    graph.node.insert(place, helper.make_node("Reshape", [argmax.input[0], f"{rows}_shape"], [rows]))
    graph.node.insert(place + 2, helper.make_node("Reshape", ["aicsd_labels_in_a_row", "aicsd_labels_shape"], [result]))
    argmax.input[0], argmax.output[0] = rows, "aicsd_labels_in_a_row"


def _last_argmax(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """Return the ArgMax whose result, cast, are the labels: a network may have others of its own."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    while node is not None and node.op_type == "Cast":
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "ArgMax" else None


def _nodes_before_first_conv(graph: onnx.GraphProto, *, flipped: bool) -> tuple[list[onnx.NodeProto], onnx.NodeProto]:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "Shape":  # of the frames, for upsampling to their size: that reads no pixel
            continue
        for name in node.input:
            readers.setdefault(name, []).append(node)
    before: list[onnx.NodeProto] = []
    tensor = graph.input[0].name
    while len(readers.get(tensor, [])) == 1:
        (node,) = readers[tensor]
        # A grouped one would need a weight for each of the three channels.
        if (
            node.op_type == "Conv"
            and constants.keys() >= set(node.input[1:])
            and constants[node.input[1]].shape[1] == 3
        ):
            return before, node
        # One of each is the preprocessing; a second one is the network's own.
        if node.op_type not in {"Cast", "Transpose", "Slice", "Mul", "Add"} - {n.op_type for n in before}:
            break
        if node.op_type == "Slice":
            axes_and_steps = [constants[name].tolist() for name in node.input[3:] if name in constants]
            if not flipped or axes_and_steps != [[1], [-1]]:  # not the order of the channels
                break
        before.append(node)
        tensor = node.output[0]
    raise InputError(
        "The preprocessing cannot be put into the first layer, as --target cpu does: this network does not begin with one "
        "convolution, not grouped and padded with zeros, that alone reads the normalised image. Use --target openvino, tensorrt or both."
    )
