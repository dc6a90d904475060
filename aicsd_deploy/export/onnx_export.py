"""A network as an ONNX file: one graph with preprocessing, network, upsampling and argmax, and its metadata inside."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Collection
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aicsd_deploy.errors import InputError, first_line
from aicsd_deploy.metadata import ONNX_KEY, Metadata
from aicsd_deploy.models.deploy import DeployModule

OPSET = 18
"""Read by TensorRT 10 and 11 and by every ONNX Runtime since 1.15."""
INPUT, OUTPUT = "frames", "labels"


def export_onnx(network: nn.Module, metadata: Metadata, path: Path, *, opset: int = OPSET) -> None:
    """Write the deployed graph of a network.

    Args:
        network: the trained network, on the CPU: normalised images (B, 3, H, W) to logits (B, C, h, w). It is left as it is.
        metadata: what the file is to say about itself; its image size, channel order and `dynamic` shape the graph.
        path: the file to write.
        opset: ONNX operator set.

    Raises:
        InputError: PyTorch cannot export this network.
    """
    network = copy.deepcopy(network)
    fuse_batch_norm(network)
    module = DeployModule(network, metadata).eval()
    height, width = metadata.image_size_hw
    # An example batch of 1 would be taken for a constant.
    frames = torch.zeros((2 if "batch" in metadata.dynamic else 1, height, width, 3), dtype=torch.uint8)
    try:
        with redirect_stderr(io.StringIO()):  # its warnings, its log and, where it fails, its graphs
            program = torch.onnx.export(
                module,
                (frames,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(_dynamic_shapes(metadata.dynamic),),
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        ways = ["leave out --dynamic size"] if "size" in metadata.dynamic else []
        ways += [f"leave out --opset {opset}"] if opset != OPSET else []
        ways += ["change that in the network"]
        raise InputError(
            f"PyTorch {torch.__version__} cannot export {metadata.model} with dynamic {sorted(metadata.dynamic) or 'nothing'}: "
            f"{first_line(error.__cause__ or error)}. You can {' or '.join(ways)}."
        ) from error
    assert program is not None
    model = program.model_proto
    found = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if found != opset:
        raise InputError(
            f"Opset {opset} was asked for but PyTorch can only write {found} for this network. Use --opset {found}."
        )
    onnx.helper.set_model_props(model, {ONNX_KEY: json.dumps(metadata.to_dict())})
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise InputError(
            f"{metadata.model} does not fit ONNX operator set {opset}: {first_line(error)}. Export with a newer one, such as --opset 20, "
            "or change that in the network."
        ) from error
    onnx.save_model(model, str(path))


def fuse_batch_norm(network: nn.Module) -> None:
    """Fold every batch normalisation that directly follows a convolution into it, in place.

    The exporter does so only for some graphs; folding here makes the file independent of that. Convolutions that compute their
    weight (weight or spectral normalisation), batch normalisations that keep no statistics and subclasses of both, which may do
    more, are left to it.
    """
    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        children = list(module.named_children())
        for (name, first), (next_name, second) in pairwise(children):
            if type(first) is not nn.Conv2d or type(second) is not nn.BatchNorm2d:
                continue
            if "weight" in dict(first.named_parameters(recurse=False)) and second.running_mean is not None:
                setattr(module, name, fuse_conv_bn_eval(first, second))
                setattr(module, next_name, nn.Identity())


def _dynamic_shapes(dynamic: Collection[str]) -> dict[int, torch.export.Dim] | None:
    shapes = {}
    if "batch" in dynamic:
        shapes[0] = torch.export.Dim("batch", min=1, max=256)
    if "size" in dynamic:
        shapes[1] = torch.export.Dim("height", min=32, max=8192)
        shapes[2] = torch.export.Dim("width", min=32, max=8192)
    return shapes or None
