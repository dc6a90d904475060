"""INT8 files: what they are made of, that they label as the float file, and that a loss beyond the limit is refused."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import CLASSES, call_script
from onnx import numpy_helper
from onnxruntime import InferenceSession
from test_onnx import frames, random_checkpoint
from torch import Tensor, nn

from aicsd_deploy.bench.environment import cpuinfo
from aicsd_deploy.checkpoint import Checkpoint
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError, MissingDependencyError, VerificationError
from aicsd_deploy.export import int8_search
from aicsd_deploy.export.cpu_graph import end_channels_last, end_in_a_row, fold_preprocessing
from aicsd_deploy.export.onnx_export import export_onnx
from aicsd_deploy.export.quantize import Quantizer, Target
from aicsd_deploy.export.verify import compare
from aicsd_deploy.metadata import ONNX_KEY, ChannelOrder, Metadata
from aicsd_deploy.models import build_model
from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.runtime.frames import as_input
from aicsd_deploy.runtime.ort_backend import OrtBackend

ONNX = "runs/student/student.onnx"
SATURATES = platform.machine() == "x86_64" and "vnni" not in " ".join(cpuinfo("flags"))
"""On a CPU without VNNI sums of eight bits saturate, in these networks with random weights often (README, INT8)."""


def at_least(share: float) -> float:
    """Return the share of pixels that must be labelled alike: where sums saturate, all that tells a right graph from a wrong one."""
    return 0.36 if SATURATES else share


MOSTLY = at_least(0.55)
"""An untrained network's pixels are close calls, so that eight bits change many; a wrong graph leaves less than a third."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    checkpoint = random_checkpoint(folder / "c.pt", "lraspp_mobilenetv2")
    export_onnx(checkpoint.build(), checkpoint.metadata, folder / "c.onnx")
    return folder / "c.onnx"


def quantized(source: Path, out: Path, target: str, **kwargs: object) -> onnx.ModelProto:
    quantizer = Quantizer(source, frames(4), target=target)
    quantizer.write(out, **({"method": "minmax", "notes": {}} | kwargs))
    quantizer.close()
    return onnx.load(out)


def test_the_rewritten_float_graph_labels_as_before(exported: Path, tmp_path: Path) -> None:
    with open_backend(exported) as before:
        model = onnx.load(exported)
        fold_preprocessing(model, before.metadata)
        end_channels_last(model)
        onnx.checker.check_model(model)
        onnx.save(model, tmp_path / "r.onnx")
        with open_backend(tmp_path / "r.onnx") as after:
            # What differs is the padding of the first layer.
            assert compare(before, after, frames()).share > 0.95
    assert not {"Slice", "Mul"} & {node.op_type for node in list(model.graph.node)[:6]}


def sharing(num_classes: int) -> nn.Module:
    first, second = nn.Conv2d(3, 3, 3, 1, 1, bias=False), nn.Conv2d(3, 3, 3, 1, 1, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(3, num_classes, 1))


def test_a_first_layer_without_a_bias_that_shares_its_weights_is_quantised(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", "test_int8:sharing")
    export_onnx(checkpoint.build(), checkpoint.metadata, tmp_path / "c.onnx")
    quantized(tmp_path / "c.onnx", tmp_path / "q.onnx", "cpu")
    with open_backend(tmp_path / "c.onnx") as before, open_backend(tmp_path / "q.onnx") as after:
        assert compare(before, after, frames()).share > 0.85


@pytest.mark.parametrize("end", [end_channels_last, end_in_a_row])
def test_the_end_of_a_graph_is_told_from_an_argmax_of_the_networks_own(end: Any, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]> agraph (float[1, 2, 2, 2] x) => (uint8[1, 4, 4] labels, float[1, 2, 4, 4] same)
        <int64[4] sizes = {1, 2, 4, 4}> {
            own = Resize <mode = "linear">(x, , , sizes)
            first = ArgMax <axis = 1>(own)
            factor = Cast <to = 1>(first)
            scaled = Mul(own, factor)
            full = Resize <mode = "linear">(scaled, , , sizes)
            last = ArgMax <axis = 1, keepdims = 0>(full)
            labels = Cast <to = 2>(last)
            same = Identity(full)
        }"""
    )
    frame = np.random.default_rng(0).standard_normal((1, 2, 2, 2)).astype(np.float32)
    before = InferenceSession(model.SerializeToString()).run(["labels"], {"x": frame})[0]
    end(model)
    onnx.checker.check_model(model, full_check=True)
    assert next(node for node in model.graph.node if "first" in node.output).input[0] == "own"
    assert (InferenceSession(model.SerializeToString()).run(["labels"], {"x": frame})[0] == before).all()
    assert 0 < before.sum() < before.size


class Scaling(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(2 * images + 1)


class Depthwise(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Conv2d(3, 6, 3, 1, 1, groups=3), nn.Conv2d(6, num_classes, 1))


class Mirroring(Scaling):
    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flip(3))


class Branching(Scaling):
    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images) + self.layer(images.flip(3))


class Standardised(nn.Module):
    """Computes its first weight, which is too large for the exporter to work out."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 64, 7, 4), nn.Conv2d(64, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        weight = self.first.weight
        return self.last(nn.functional.conv2d(images, weight - weight.mean((1, 2, 3), keepdim=True), stride=4))


class WithoutLayers(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(num_classes, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("network", "target", "message"),
    [
        (Scaling, "cpu", "Use --target openvino"),
        (Depthwise, "cpu", "Use --target openvino"),
        (Mirroring, "cpu", "Use --target openvino"),
        (Branching, "cpu", "Use --target openvino"),
        (Standardised, "cpu", "Use --target openvino"),
        (WithoutLayers, "tensorrt", "has no convolution"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    network: type[nn.Module], target: str, message: str, tmp_path: Path
) -> None:
    # Frames in red, green, blue need no Slice: the only one can be the network's own.
    order: ChannelOrder = "rgb" if network is Mirroring else "bgr"
    metadata = Metadata(f"test_int8:{network.__name__}", CLASSES, (64, 96), data="synthetic", channel_order=order)
    checkpoint = Checkpoint(metadata, build_model(metadata.model, num_classes=len(CLASSES)).state_dict())
    export_onnx(checkpoint.build(), metadata, tmp_path / "c.onnx")
    with pytest.raises(InputError, match=message):
        quantized(tmp_path / "c.onnx", tmp_path / "q.onnx", target)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_file_whose_input_has_another_name_is_quantised_too(exported: Path, tmp_path: Path, target: str) -> None:
    model = onnx.load(exported)
    old, model.graph.input[0].name = model.graph.input[0].name, "pictures"
    for node in model.graph.node:
        node.input[:] = ["pictures" if name == old else name for name in node.input]
    onnx.save_model(model, str(tmp_path / "renamed.onnx"))
    quantized(tmp_path / "renamed.onnx", tmp_path / "q.onnx", target)
    with open_backend(tmp_path / "q.onnx") as after:
        assert after.metadata.precision == "int8"


def test_a_cpu_file_reads_pixels_and_keeps_chains_in_eight_bits(exported: Path, tmp_path: Path) -> None:
    model = quantized(exported, tmp_path / "cpu.onnx", "cpu")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    dequantize = next(node for node in model.graph.node if node.output[0] == first.input[0])
    assert float(constants[dequantize.input[1]]) == 1.0, "one step of the first activation is one step of a pixel"
    assert not [n for n in model.graph.node if n.op_type in ("Clip", "Relu")], "activations lie in the ranges"
    weights = {name: v for name, v in constants.items() if v.dtype == np.int8 and v.ndim == 4}
    assert len(weights) == 55, "weights of all layers"
    scales = {n.input[0]: constants[n.input[1]] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    assert all(scales[name].shape == v.shape[:1] for name, v in weights.items()), "a scale for each channel"
    with open_backend(exported) as before, OrtBackend(tmp_path / "cpu.onnx") as after:
        assert after.metadata.precision == "int8"
        assert after.metadata.provenance["int8_target"] == "cpu"
        assert compare(before, after, frames()).share > MOSTLY


def test_a_tensorrt_file_has_what_its_parser_takes(exported: Path, tmp_path: Path) -> None:
    model = quantized(exported, tmp_path / "trt.onnx", "tensorrt")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {constants[n.input[2]].dtype for n in pairs} == {np.dtype(np.int8)}, "no bias in int32, no uint8"
    assert all((constants[n.input[2]] == 0).all() for n in pairs), "symmetric"
    with open_backend(exported) as before, open_backend(tmp_path / "trt.onnx") as after:
        assert compare(before, after, frames()).share > MOSTLY
        assert after.metadata.provenance["int8_target"] == "tensorrt"


class Attending(nn.Module):
    """A convolution, two products of activations as in attention, and two linear layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images)
        tokens = maps.flatten(2).transpose(1, 2)
        mixed = torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1) @ tokens
        return self.layers(tokens + mixed).transpose(1, 2).unflatten(2, maps.shape[2:])


@pytest.mark.parametrize("target", ["cpu", "openvino", "tensorrt"])
def test_linear_layers_are_quantised_and_attention_stays_in_float(target: Target, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", "test_int8:Attending")
    export_onnx(checkpoint.build(), checkpoint.metadata, tmp_path / "c.onnx")
    model = quantized(tmp_path / "c.onnx", tmp_path / "q.onnx", target)
    dequantised = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    products = [n for n in model.graph.node if n.op_type in ("Conv", "MatMul")]
    eight_bits = [dequantised.issuperset(n.input[:2]) for n in products]
    assert [n.op_type for n in products] == ["Conv", "MatMul", "MatMul", "MatMul", "MatMul"]
    assert eight_bits == [True, False, False, True, True]
    with open_backend(tmp_path / "c.onnx") as before, open_backend(tmp_path / "q.onnx") as after:
        assert compare(before, after, frames()).share > at_least(0.9)


def test_an_openvino_file_runs_in_openvino_and_labels_as_the_float_file(exported: Path, tmp_path: Path) -> None:
    model = quantized(exported, tmp_path / "ov.onnx", "openvino")
    argmax = next(node for node in model.graph.node if node.op_type == "ArgMax")
    assert [node.op_type for node in model.graph.node if node.output[0] == argmax.input[0]] == ["Reshape"]
    with open_backend(exported) as before, open_backend(tmp_path / "ov.onnx", threads=1) as after:
        assert (after.name, after.device) == ("openvino CPU", "cpu")
        assert after.metadata.provenance["int8_target"] == "openvino"
        assert compare(before, after, frames()).share > MOSTLY
        with OrtBackend(tmp_path / "ov.onnx") as other:
            assert compare(other, after, frames()).share > at_least(0.8), "the same file in another runtime"
        first, second = (np.ascontiguousarray(as_input(frame, after.metadata)) for frame in frames()[:2])
        labels = after.infer(first)
        kept = labels.copy()
        after.infer(second)
        assert (labels == kept).all(), "labels are the caller's own"
        stages = after.time_stages([first] * 3)
        assert set(stages) == {"preprocessing", "network", "postprocessing"}
        assert stages["network"] > stages["preprocessing"]
        with pytest.raises(InputError, match="takes frames of"):
            after.infer(np.zeros((1, 32, 32, 3), np.uint8))


def test_openvino_is_imported_without_starting_a_process_or_telling_anybody() -> None:
    """In a new process: this one has imported it."""
    program = (
        "import multiprocessing, sys; from aicsd_deploy.runtime.openvino_backend import import_openvino\n"
        "multiprocessing.Process = lambda *_, **__: print('started')\n"
        "import_openvino(); import openvino.tools.ovc\n"
        "print('openvino_telemetry' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}  # where it sends nothing
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.split() == ["False"]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic")
    checkpoint = random_checkpoint(folder / "c.pt", "lraspp_mobilenetv2")
    export_onnx(checkpoint.build(), checkpoint.metadata.replace(dynamic=("batch", "size")), folder / "c.onnx")
    return folder / "c.onnx"


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_a_file_may_take_any_batch_and_size(target: Target, dynamic: Path, tmp_path: Path) -> None:
    quantized(dynamic, tmp_path / "q.onnx", target)
    batch = np.random.default_rng(0).integers(0, 256, (3, 96, 64, 3), np.uint8)
    with open_backend(tmp_path / "q.onnx") as backend, open_backend(dynamic) as other:
        assert backend.name == ("openvino CPU" if target == "openvino" else "onnxruntime CPU")
        assert (backend.infer(batch) == other.infer(batch)).mean() > MOSTLY


def test_what_an_openvino_file_lacks_is_said(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ov.onnx"
    quantized(exported, path, "openvino")
    with pytest.raises(InputError, match="--device cuda"):
        open_backend(path, device="cuda")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes()[1000:])
    with pytest.raises(InputError, match=r"damaged\.onnx is no ONNX file that OpenVINO.*Export or copy it again"):
        open_backend(damaged)
    foreign = onnx.load(path)
    next(entry for entry in foreign.metadata_props if entry.key == ONNX_KEY).key = "another"
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="not exported by this toolkit"):
        open_backend(tmp_path / "foreign.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"aicsd-deploy\[openvino\]"):
        open_backend(path)


@pytest.mark.parametrize("target", ["tensorrt", "both"])
def test_tensorrt_rtx_builds_an_engine_from_it(exported: Path, tmp_path: Path, target: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    quantized(exported, tmp_path / "trt.onnx", target)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(tmp_path / "trt.onnx"))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize(
    "places", [(0, -1), (1, 3)]
)  # 1 and 3 stand between quantised tensors, where ONNX Runtime meddles
def test_layers_can_be_left_in_float(exported: Path, tmp_path: Path, places: tuple[int, int]) -> None:
    quantizer = Quantizer(exported, frames(2), target="cpu")
    layers = [quantizer.layers[place] for place in places]
    quantizer.write(tmp_path / "x.onnx", method="minmax", float_layers=layers, notes={})
    quantizer.close()
    model = onnx.load(tmp_path / "x.onnx")
    quantised = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert (node.input[1] in quantised) == (node.name not in layers), node.name
    with open_backend(exported) as before, open_backend(tmp_path / "x.onnx") as after:
        assert compare(before, after, frames()).share > MOSTLY


def test_a_quantised_file_is_not_quantised_again(exported: Path, tmp_path: Path) -> None:
    quantized(exported, tmp_path / "cpu.onnx", "cpu")
    with pytest.raises(InputError, match="quantised already"):
        Quantizer(tmp_path / "cpu.onnx", frames(1), target="cpu")


@pytest.mark.parametrize(
    ("on_val", "proved", "kept"),
    [
        ({"entropy": 0.6, "minmax": 0.7}, ["entropy"], "entropy"),
        ({"entropy": 0.4, "minmax": 0.5}, ["entropy", "minmax"], "minmax"),
        ({"entropy": 0.4, "minmax": 0.3}, ["entropy", "minmax"], None),
    ],
)
def test_the_best_method_on_unseen_training_images_is_proved_first(
    on_val: dict[str, float], proved: list[str], kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float file has an mIoU of 0.6, of which 0.1 may be lost."""
    train, val = open_dataset("synthetic", "train"), open_dataset("synthetic", "val")
    on_train = {"entropy": 0.2, "minmax": 0.1}
    images: dict[str, set[str]] = {}
    seen: list[str] = []

    class Named:
        """Writes the name of the method where the file would be."""

        layers = ("only",)

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def write(self, path: Path, *, method: str, **_: object) -> None:
            path.write_text(method)

        def close(self) -> None:
            pass

    def evaluate(backend: Any, dataset: Any, **_: object) -> Any:
        method = backend.metadata.class_names
        if dataset is val and method != "float":
            seen.append(method)
        elif dataset is not val:
            images["choose"] = {dataset.name(i) for i in range(len(dataset))}
        miou = 0.6 if method == "float" else (on_val if dataset is val else on_train)[method]
        return SimpleNamespace(scores=lambda names: SimpleNamespace(labelled_miou=miou))

    def frames_for_comparison(dataset: Any, *, count: int) -> list[Any]:
        images.setdefault("calibrate", {dataset.name(i) for i in range(len(dataset))})
        return []

    def opened(path: Path, **_: object) -> Any:
        return nullcontext(SimpleNamespace(metadata=SimpleNamespace(class_names=path.read_text())))

    for replacement in (evaluate, frames_for_comparison):
        monkeypatch.setattr(int8_search, replacement.__name__, replacement)
    monkeypatch.setattr(int8_search, "open_backend", opened)
    monkeypatch.setattr(int8_search, "Quantizer", Named)
    monkeypatch.setattr(int8_search, "compare", lambda *_: SimpleNamespace(share=1.0))
    (tmp_path / "float").write_text("float")
    limits = {"frames": 3, "methods": ["minmax", "entropy"], "max_miou_drop": 0.1 + 1e-9}
    how: Any = {"target": "cpu", "train": train, "val": val} | limits
    if kept is None:
        with pytest.raises(VerificationError, match=r"60\.00 to 40\.00 %"):
            int8_search.quantize_within(tmp_path / "float", tmp_path / "out", **how)
    else:
        assert int8_search.quantize_within(tmp_path / "float", tmp_path / "out", **how).method == kept
    assert seen == proved
    assert len(images["calibrate"]) == len(images["choose"]) == 3
    assert not images["calibrate"] & images["choose"]


def test_the_command_proves_what_it_writes(trained: Path, tmp_path: Path) -> None:
    out, result_file = tmp_path / "s.int8.onnx", tmp_path / "r.json"
    result = call_script("export/to_int8.py", ONNX, "-o", out, "--frames", 4, "--json", result_file, cwd=trained)
    assert result.returncode == 0, result.stderr
    found = json.loads(result_file.read_text())
    assert set(found["methods"]) == {"minmax", "entropy", "percentile"}
    assert found["miou_drop"] <= 0.01
    assert found["miou_drop"] == found["float_scores"]["miou"] - found["int8_scores"]["miou"]
    assert found["methods"][found["method"]] == max(found["methods"].values())
    scored = call_script("train/evaluate.py", out, "--json", "-", cwd=trained)
    assert json.loads(scored.stdout) == found["int8_scores"]


def test_costly_layers_are_left_in_float_until_the_limit_holds(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(self: Quantizer, path: Path, *, float_layers: list[str] = (), **kwargs: object) -> None:  # type: ignore[assignment]
        write(self, path, float_layers=float_layers, **kwargs)
        if self.layers[1] not in float_layers:  # as if eight bits ruined this layer
            model = onnx.load(path)
            int8 = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
            weight = next(tensor for tensor in int8 if tensor.dims[0] == 3)
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
            onnx.save(model, path)

    write = Quantizer.write
    monkeypatch.setattr(Quantizer, "write", spoiling)
    command = ["export/to_int8.py", ONNX, "--frames", 4, "--method", "minmax", "-o", tmp_path / "s.onnx"]
    result = call_script(*command, "--json", tmp_path / "r.json", cwd=trained)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    worst = max(found["layer_costs"], key=found["layer_costs"].get)
    assert found["float_layers"] == [worst]
    assert worst in result.stderr
    (tmp_path / "s.onnx").unlink()
    monkeypatch.setattr(Quantizer, "write", lambda self, path, **k: spoiling(self, path, **k | {"float_layers": ()}))
    result = call_script(*command, cwd=trained)
    assert result.returncode == 3, result.stderr
    tried = re.search(r"with (\d+) of (\d+) layers left in float", result.stderr)
    assert tried is not None
    assert int(tried[1]) == int(tried[2]) // 2, "no more than half are given up, and no fewer"
    assert not (tmp_path / "s.onnx").exists()
