"""Engines built for real with TensorRT-RTX, which needs no GPU: in the precision asked for, proved, or not kept."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from helpers import call_script, random_checkpoint, write_folder_dataset
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError, MissingDependencyError, VerificationError
from aicsd_deploy.export.engine import choose_flavor
from aicsd_deploy.export.engine_checks import require_precision
from aicsd_deploy.export.gate import LIMITS, Drop, Limits, measure_drop, require_within
from aicsd_deploy.export.onnx_export import export_onnx
from aicsd_deploy.export.ranges import layer_errors, nodes_to_keep
from aicsd_deploy.export.tensorrt_build import BuildOptions, PrecisionFound, build_engine
from aicsd_deploy.export.verify import Agreement, compare
from aicsd_deploy.files import sha256
from aicsd_deploy.metadata import ONNX_KEY, Metadata
from aicsd_deploy.runtime import driver, tensorrt_module
from aicsd_deploy.runtime.base import Backend

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SCENES = open_dataset("synthetic", "val")
STUDENTS = ["lraspp_mobilenetv2", "lraspp_resnet18", "deeplabv3plus_mobilenetv2", "deeplabv3plus_resnet18"]
SYMMETRIC: dict[str, Any] = {
    "quant_format": QuantFormat.QDQ,
    "activation_type": QuantType.QInt8,
    "weight_type": QuantType.QInt8,
    "per_channel": True,
    "op_types_to_quantize": ["Conv"],
    "extra_options": {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "DedicatedQDQPair": True,
    },
}


def export(folder: Path, model: str, dynamic: tuple[str, ...] = ()) -> Path:
    """Write a random network's checkpoint and, without the gate of export/to_onnx.py, its ONNX file."""
    checkpoint = random_checkpoint(folder / "best.pt", model, classes=SCENES.classes)
    provenance = {"checkpoint_sha256": sha256(folder / "best.pt")}
    metadata = checkpoint.metadata.replace(dynamic=dynamic, provenance=provenance)
    export_onnx(checkpoint.build(), metadata, folder / "net.onnx")
    return folder / "net.onnx"


def quantise(path: Path, out: Path, **settings: Any) -> Path:
    class Frames(CalibrationDataReader):
        def __init__(self) -> None:
            self.frames = iter([np.ascontiguousarray(SCENES.load(i)[0][:64, :96])[None] for i in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            frame = next(self.frames, None)
            return None if frame is None else {"frames": frame}

    quantize_static(str(path), str(out), Frames(), **settings)
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every student, exported."""
    return {name: export(tmp_path_factory.mktemp(name), name) for name in STUDENTS}


@pytest.fixture
def small(exported: dict[str, Path]) -> Path:
    return exported["deeplabv3plus_mobilenetv2"]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("dynamic"), "lraspp_mobilenetv2", ("batch", "size"))


def build(*arguments: object, cwd: Path) -> Any:
    return call_script("export/to_trt.py", *arguments, "--flavor", "rtx", "--frames", 4, cwd=cwd)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_in_every_precision(exported: dict[str, Path], name: str, precision: str, tmp_path: Path) -> None:
    student = exported[name]
    source = quantise(student, student.with_name("int8.onnx"), **SYMMETRIC) if precision == "int8" else student
    # A random network has no margin between its classes, so rounding moves many pixels; the proof of precision is what counts.
    loose = ["--min-agreement", 0, "--max-miou-drop", 100] if precision != "fp32" else []
    result = build(source, f"--{precision}", "--target", "sm86,sm89", "-o", tmp_path / "s.plan", *loose, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "s.plan.json").read_text())
    assert card["precision_found"]["weights"].keys() == {precision}
    assert card["precision_found"]["weighted_layers"].keys() == {precision}
    assert card["targets"] == ["sm86", "sm89"]
    assert card["plan_sha256"] == sha256(tmp_path / "s.plan")
    assert card["onnx_sha256"] == sha256(source)
    assert card["gate"]["reference"].endswith("best.pt")
    assert card["gate"]["agreement"] > 0.9 or precision in ("int8", "bf16")
    assert card["gate"]["limits"]["miou_drop"] == (1 if loose else 0.001), "a fraction, as all scores of the card"
    if precision == "int8":  # in float32 only the preprocessing, and what stands around it
        layers = card["precision_found"]["layers"]
        assert layers["fp16"] > layers.get("fp32", 0)
    half = {"fp32": 4, "fp16": 2, "bf16": 2}.get(precision)
    if half:  # weights are most of a plan, so its size shows their type too
        weights = sum(card["precision_found"]["weights"].values())
        assert (tmp_path / "s.plan").stat().st_size < half * weights + 2_500_000


def as_fp8(path: Path, out: Path) -> Path:
    """Turn the int8 values and zero points of a quantised file into float8."""
    model = onnx.version_converter.convert_version(onnx.load(path), 19)
    model.metadata_props.extend(onnx.load(path).metadata_props)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            values = numpy_helper.to_array(tensor).astype(np.float32).ravel()
            kind = onnx.TensorProto.FLOAT8E4M3FN
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, tensor.dims, values))
    del model.graph.value_info[:]
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("name", ["lraspp_mobilenetv2", "lraspp_resnet18"])
def test_fp8(exported: dict[str, Path], name: str, tmp_path: Path) -> None:
    path = as_fp8(quantise(exported[name], tmp_path / "int8.onnx", **SYMMETRIC), tmp_path / "fp8.onnx")
    flags = ["--reference", exported[name].with_name("best.pt"), "--min-agreement", 0, "--max-miou-drop", 100]
    result = build(path, "--fp8", "--target", "sm89", *flags, "-o", "s.plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "s.plan.json").read_text())
    assert card["precision_found"]["weights"].keys() == card["precision_found"]["weighted_layers"].keys() == {"fp8"}
    result = build(path, "--fp8", "--target", "sm86", *flags, "-o", "t.plan", cwd=tmp_path)
    assert result.returncode == 2
    assert "sm86" in result.stderr


def test_int8_with_a_channel_that_is_nearly_dead(small: Path, tmp_path: Path) -> None:
    model = onnx.load(quantise(small, small.with_name("int8.onnx"), **SYMMETRIC))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = next(
        weights[node.input[1]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights and weights[node.input[1]].dims
    )
    values = numpy_helper.to_array(scale).copy()
    values[0] = 1e-12  # 0 in float16, which no scale may be
    scale.CopyFrom(numpy_helper.from_array(values, scale.name))
    onnx.save_model(model, tmp_path / "dead.onnx")
    loose = ["--min-agreement", 0, "--max-miou-drop", 100]
    result = build(
        "dead.onnx", "--int8", "-o", "s.plan", "--reference", small.with_name("best.pt"), *loose, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_a_layer_with_float_weights_does_not_compute_in_int8(small: Path, tmp_path: Path) -> None:
    model = onnx.load(quantise(small, tmp_path / "int8.onnx", **SYMMETRIC))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    values, scale = (numpy_helper.to_array(weights[name]) for name in made_by[conv.input[1]].input[:2])
    floats = (values * scale.reshape(-1, 1, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(floats, "floats"))
    conv.input[1] = "floats"
    found = build_engine(model, "rtx", BuildOptions()).precision
    assert found.weights["fp32"] == floats.size
    assert found.weighted_layers["fp32"] == 1
    assert found.exceptions == (conv.name,)


def test_nodes_without_names(small: Path, tmp_path: Path) -> None:
    model = onnx.load(small)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "net.onnx")
    result = build("net.onnx", "--reference", small.with_name("best.pt"), "-o", "s.plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_errors_of_values_whose_squares_float32_cannot_hold() -> None:
    def scaled(by: float) -> onnx.ModelProto:
        return onnx.parser.parse_model(
            f"""<ir_version: 9, opset_import: ["" : 18]> agraph (uint8[4] x) => (float[4] minus_z)
            <float large = {{1e30}}, float by = {{{by}}}> {{
                y = Cast<to = 1>(x)
                large_y = Mul(y, large)
                z = Mul(large_y, by)
                minus_z = Neg(z)
            }}"""
        )

    frames = [np.arange(4, dtype=np.uint8)]
    errors = layer_errors(scaled(1.0), scaled(1.25), frames)
    assert list(errors.values()) == pytest.approx([0.25, 0, 0, 0]), "what an input brings along is not counted again"
    assert next(iter(errors)) == "node_of_z"


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_a_build(
    number: int, raised: type, small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def progress(*_: object) -> Iterator[Any]:
        yield lambda: os.kill(os.getpid(), number)

    def handler(*_: object) -> None:
        raise raised

    monkeypatch.setattr("aicsd_deploy.export.tensorrt_build.progress", progress)
    before = signal.signal(number, handler)
    try:
        with pytest.raises(raised):
            build_engine(onnx.load(small), "rtx", BuildOptions())
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert "Exception" not in capfd.readouterr().err


def test_twice_the_same_engine(small: Path) -> None:
    options = BuildOptions(targets=("sm86", "sm120"))
    assert build_engine(onnx.load(small), "rtx", options).plan == build_engine(onnx.load(small), "rtx", options).plan


def test_a_dynamic_engine_is_compared_at_three_sizes(dynamic: Path, tmp_path: Path) -> None:
    result = build(dynamic, "--fp32", "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "s.plan.json").read_text())
    assert card["profiles"] == [[[1, 32, 64], [1, 64, 96], [8, 96, 128]]]
    assert set(card["gate"]["agreement_by_size"]) == {"32x64", "64x96", "96x128"}


def test_an_engine_that_disagrees_with_its_checkpoint_is_not_kept(small: Path, tmp_path: Path) -> None:
    model = onnx.load(small)
    weights = next(i for i in model.graph.initializer if len(i.dims) == 4 and i.dims[0] == len(SCENES.classes))
    weights.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weights), weights.name))
    onnx.save(model, tmp_path / "net.onnx")
    result = build(
        tmp_path / "net.onnx", "--reference", small.with_name("best.pt"), "-o", tmp_path / "s.plan", cwd=tmp_path
    )
    assert result.returncode == 3, result.stderr
    assert "Classes that lose most IoU" in result.stderr
    assert "Layers that add most error" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_accuracy_is_gated_besides_agreement() -> None:
    agreement = Agreement(0.999, {"32x64": 0.999}, {"road": 0.999, "pole": 0.2}, ("road", 0.9), frames=4)
    drop = Drop(agreement, reference_miou=0.600, candidate_miou=0.594, iou_drop={"road": 0.001, "pole": 0.011})
    require_within(drop, Limits(agreement=0.995, miou_drop=0.0065), what="it")
    with pytest.raises(VerificationError, match=r"-0\.60 points \(a fall of 0\.5 is allowed\).*pole -1\.1, road -0\.1"):
        require_within(drop, LIMITS["fp16"], what="it")
    require_within(replace(drop, candidate_miou=0.7), LIMITS["fp16"], what="it")  # it may gain any amount
    by_size = {"32x64": 0.9995, "64x96": 0.98}
    one_size_is_bad = replace(drop, agreement=replace(agreement, by_size=by_size), candidate_miou=0.6)
    with pytest.raises(VerificationError, match=r"at 64x96 they agree on 98\.00 %"):
        require_within(one_size_is_bad, LIMITS["fp16"], what="it")


def test_layers_are_named_in_bfloat16_too(small: Path, tmp_path: Path) -> None:
    result = build(small, "--bf16", "--min-agreement", 1, "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert "Layers that add most error" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_openvino_is_proved_in_the_runtime_that_the_card_names(small: Path, tmp_path: Path) -> None:
    model = onnx.load(quantise(small, tmp_path / "int8.onnx", **SYMMETRIC))
    text = next(entry for entry in model.metadata_props if entry.key == ONNX_KEY)
    value = json.loads(text.value)
    value["provenance"]["int8_target"] = "openvino"
    text.value = json.dumps(value)
    onnx.save(model, tmp_path / "int8.onnx")
    reference = ["--reference", small.with_name("best.pt"), "--min-agreement", 0, "--max-miou-drop", 100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        result = build("int8.onnx", "--int8", *reference, "-o", "s.plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "in ONNX Runtime" in json.loads((tmp_path / "s.plan.json").read_text())["gate"]["compared"]


class ByBrightness(Backend):
    """Labels a pixel by its own value."""

    name, device = "by brightness", "cpu"

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata

    def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
        return frames_NHWC[..., 0] % len(self.metadata.classes)


class Seen(SegmentationDataset):
    """Frames that note which of them are taken; `broken` cannot be loaded."""

    def __init__(self, length: int, broken: int = -1) -> None:
        self.classes, self.spec, self.split = SCENES.classes, "seen", "val"
        self.length, self.broken, self.taken = length, broken, set[int]()

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> Any:
        if index == self.broken:
            raise InputError(f"{index}.png is damaged")
        self.taken.add(index)
        return SCENES.load(0)


def test_frames_are_compared_a_few_at_a_time() -> None:
    class Counting(ByBrightness):
        def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
            batches.append(len(frames_NHWC))
            return super().infer(frames_NHWC)

    batches: list[int] = []
    metadata = Metadata("m", SCENES.classes, (16, 16), dynamic=("batch",))
    frames = [SCENES.load(i)[0] for i in range(9)]
    assert compare(ByBrightness(metadata), Counting(metadata), frames).share == 1
    assert batches == [4, 4, 1]


def test_the_gates_images_are_spread_over_all() -> None:
    backend, seen = ByBrightness(Metadata("m", SCENES.classes, (16, 16))), Seen(31)
    measure_drop(backend, backend, seen, frames=16)
    assert seen.taken == set(range(0, 31, 2))


def test_what_is_lost_is_the_references_score_less_the_candidates() -> None:
    class OneClass(ByBrightness):
        def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
            return np.zeros(frames_NHWC.shape[:3], np.uint8)

    class Brightness(Seen):
        def load(self, index: int) -> Any:
            image = super().load(index)[0]
            return image, image[..., 2] % len(self.classes)  # blue, which comes first in a frame

    metadata, dataset = Metadata("m", SCENES.classes, SCENES.load(0)[0].shape[:2]), Brightness(1)
    shares = np.bincount(dataset.load(0)[1].ravel(), minlength=len(SCENES.classes)) / dataset.load(0)[1].size
    drop = measure_drop(ByBrightness(metadata), OneClass(metadata), dataset, frames=1)
    assert drop.reference_miou == 1
    assert drop.candidate_miou == pytest.approx(shares[0] / len(shares))
    assert list(drop.iou_drop.values()) == pytest.approx([1 - shares[0]] + [1.0] * (len(shares) - 1))


def test_one_pixel_of_a_class_that_no_label_has_is_no_loss_of_a_class() -> None:
    class Stray(ByBrightness):
        def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
            labels_NHW = frames_NHWC[..., 0] % (len(self.metadata.classes) - 1)
            labels_NHW[:, 0, 0] = self.stray
            return labels_NHW

    class Labelled(Seen):
        def load(self, index: int) -> Any:
            image = super().load(index)[0]
            return image, image[..., 2] % (len(self.classes) - 1)

    metadata = Metadata("m", SCENES.classes, SCENES.load(0)[0].shape[:2])
    right, wrong = Stray(metadata), Stray(metadata)
    right.stray, wrong.stray = int(Labelled(1).load(0)[1][0, 0]), len(SCENES.classes) - 1
    for reference, candidate, sign in ((right, wrong, 1), (wrong, right, -1)):
        drop = measure_drop(reference, candidate, Labelled(1), frames=1)
        assert 0 < sign * drop.miou_drop < 0.01, "the class of the pixel's label has one pixel less"


def test_a_damaged_image_is_bad_input_and_no_verdict() -> None:
    backend = ByBrightness(Metadata("m", SCENES.classes, (16, 16)))
    with pytest.raises(InputError, match=r"^2\.png is damaged"):
        measure_drop(backend, backend, Seen(3, broken=2), frames=3)


def test_pspnet_of_any_size_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    path = export(tmp_path, "smp:PSPNet:resnet18", ("size",))
    result = build(path, "--fp32", "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert not list(tmp_path.glob("*.plan*"))


@pytest.mark.parametrize(
    ("half", "pixel", "weight", "bias", "reason"),
    {
        "within a quarter of float16's range": ("fp16", 200, 50, 0, None),
        "beyond it": ("fp16", 200, 100, 0, "its values reach 2e+04"),
        "within bfloat16's": ("bf16", 200, 100, 0, None),
        "without all digits": ("fp16", 1, 3e-5, 0, "its values are at most 3e-05"),
        "a weight that overflows": ("fp16", 0, 1e5, 0, "its weights (up to 1e+05) do not fit fp16"),
        "a weight that becomes zero": ("fp16", 200, 1e-8, 0, "its weights (up to 1e-08) do not fit fp16"),
        "a lost bias beside large values": ("fp16", 200, 1, 1e-8, None),
        "a lost bias alone": ("fp16", 0, 1, 1e-8, "its weights (up to 1e-08) do not fit fp16"),
        "no number": ("fp16", 200, -1, 0, "its values reach inf"),
    }.values(),
)
def test_nodes_whose_values_or_weights_half_precision_cannot_hold(
    half: Any, pixel: int, weight: float, bias: float, reason: str | None
) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]> agraph (uint8[1, 1, 2, 2] x) => (float[1, 1, 2, 2] root)
        <float[1, 1, 1, 1] weight = {{{weight}}}, float[1] bias = {{{bias}}}> {{
            y = Cast<to = 1>(x)
            z = Conv(y, weight, bias)
            root = Sqrt(z)
        }}"""
    )
    frames = [np.full((1, 1, 2, 2), value, np.uint8) for value in (pixel, 0)]
    found = nodes_to_keep(model, half, frames)
    assert found.get("node_of_root" if weight < 0 else "node_of_z") == reason


def scaled_beyond_fp16(path: Path, out: Path, factor: float = 2e5) -> Path:
    """Scale one convolution far up and the one after it back down, which changes nothing in float32."""
    model = onnx.load(path)
    weights = {i.name: i for i in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def scale(name: str, by: float) -> None:
        values = (numpy_helper.to_array(weights[name]) * by).astype(np.float32)
        weights[name].CopyFrom(numpy_helper.from_array(values, name))

    for node in model.graph.node:
        after = readers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type == "Relu":
            after = readers[after[0].output[0]]
        if node.op_type == "Conv" and len(after) == 1 and after[0].op_type == "Conv":
            for name in node.input[1:]:
                scale(name, factor)
            scale(after[0].input[1], 1 / factor)
            onnx.save(model, out)
            return out
    raise AssertionError("no convolution follows another directly")


class Mixed(nn.Module):
    """What TensorRT or ONNX has in float32 and float16 only (transposed convolution, HardSwish, Einsum), and attention."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 48, 3, 4, 1)
        self.norm, self.attention = nn.LayerNorm(48), nn.MultiheadAttention(48, 4, batch_first=True)
        self.up, self.last = nn.ConvTranspose2d(48, 16, 2, 2), nn.Conv2d(16, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.hardswish(self.first(images))
        batch, channels, height, width = features.shape
        tokens = self.norm(features.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        gram = torch.einsum("bnc,bnd->bcd", tokens, tokens).softmax(dim=-1)
        mixed = (tokens @ gram).transpose(1, 2).reshape(batch, channels, height, width)
        return self.last(F.hardswish(self.up(mixed)))


@pytest.mark.parametrize(
    ("precision", "kept"),
    [("fp16", set()), ("bf16", {f"there is no {op} in bf16" for op in ("ConvTranspose", "HardSwish", "Einsum")})],
)
def test_operators_that_do_not_exist_in_half_precision_stay_in_float32(
    precision: str, kept: set[str], tmp_path: Path
) -> None:
    path = export(tmp_path, "test_tensorrt:Mixed", ("batch", "size"))
    loose = ["--min-agreement", 0, "--max-miou-drop", 100]
    result = build(path, f"--{precision}", *loose, "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "s.plan.json").read_text())
    assert set(card["float32_nodes"].values()) == kept
    assert card["gate"]["agreement"] > 0.9


def test_a_convolution_beyond_the_range_of_fp16_stays_in_float32(small: Path, tmp_path: Path) -> None:
    path = scaled_beyond_fp16(small, tmp_path / "net.onnx")
    reference = ["--reference", small.with_name("best.pt")]
    result = build(path, "--fp16", *reference, "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "stay in float32" in result.stderr
    card = json.loads((tmp_path / "s.plan.json").read_text())
    assert 1 <= len(card["float32_nodes"]) <= 4
    assert card["precision_found"]["weighted_layers"]["fp32"] == 2
    assert card["gate"]["agreement"] >= 0.995


def test_without_the_measured_list_the_same_graph_would_be_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = scaled_beyond_fp16(small, tmp_path / "net.onnx")
    monkeypatch.setattr("aicsd_deploy.export.engine.nodes_to_keep", lambda *_: {})
    reference = ["--reference", small.with_name("best.pt")]
    result = build(path, "--fp16", *reference, "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert not list(tmp_path.glob("*.plan*"))


def test_asymmetric_int8_is_refused_with_the_reason(small: Path, tmp_path: Path) -> None:
    path = quantise(small, tmp_path / "int8.onnx")
    result = build(path, "--int8", "--reference", small.with_name("best.pt"), "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 2
    assert "asymmetrically" in result.stderr
    assert "to_int8.py FLOAT32.onnx --target tensorrt" in result.stderr


def in_float16(source: Path, out: Path) -> None:
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), out)


def optimised(source: Path, out: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (in_float16, "half precision already"),
        (quantize_dynamic, "quantised already"),
        (optimised, "not ONNX's (FusedConv)"),
    ],
)
def test_a_graph_that_another_tool_rewrote_is_refused_with_the_reason(
    change: Any, says: str, small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.onnx"
    change(small, path)
    for precision in ("--fp16", "--fp32"):
        result = build(path, precision, "-o", tmp_path / "s.plan", cwd=tmp_path)
        assert result.returncode == 2
        assert says in result.stderr
    result = call_script("export/to_int8.py", path, "--target", "tensorrt", "-o", "q.onnx", cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    {
        "int8 of a float file": (["--int8"], "net.onnx --target tensorrt"),
        "a card RTX has not": (["--target", "sm90"], "sm86"),
        "version": (["--version-compatible"], "not for TensorRT-RTX"),
        "hardware": (["--hardware-compatible"], "not for TensorRT-RTX"),
        "dla": (["--dla", 0], "Jetson"),
        "timing cache": (["--timing-cache", "cache"], "not for TensorRT-RTX"),
        "profile in disorder": (["--profile", "2x64x96", "1x64x96", "4x64x96"], "in this order"),
        "profile of another size": (["--profile", "1x128x128", "1x128x128", "4x128x256"], "holds 1x64x96"),
        "profile of batches only": (["--profile", "2x64x96", "4x64x96", "8x64x96"], "holds 1x64x96"),
        "profile of text": (["--profile", "a", "b", "c"], "NxHxW"),
        "share": (["--min-agreement", "2"], "0 to 1"),
    }.values(),
)
def test_what_does_not_fit_is_said(arguments: list[object], expected: str, dynamic: Path, tmp_path: Path) -> None:
    result = build(dynamic, *arguments, "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_profile_beyond_a_static_file_is_refused(small: Path, tmp_path: Path) -> None:
    result = build(small, "--profile", "1x64x96", "1x64x96", "4x64x96", "-o", tmp_path / "s.plan", cwd=tmp_path)
    assert result.returncode == 2
    assert "--dynamic batch size" in result.stderr


def test_asked_for_fp16_and_got_fp32_is_an_error() -> None:
    found = PrecisionFound({"fp32": 9, "fp16": 1}, {"fp32": 900, "fp16": 100}, {}, ())
    with pytest.raises(VerificationError, match=r"10 % of its weights"):
        require_precision(found, "fp16", "s.plan")
    require_precision(found, "fp32", "s.plan")


class FakeDriver:
    """libcuda with one card; `start` is what cuInit gives."""

    def __init__(self, start: int = 0, cuda: int = 13000) -> None:
        self.cuInit = lambda _: start
        self.cuDeviceGetCount = lambda out: self._set(out, 1)
        self.cuDriverGetVersion = lambda out: self._set(out, cuda)
        self.cuDeviceGet = lambda out, _: self._set(out, 0)
        self.cuDeviceGetAttribute = lambda out, attribute, _: self._set(out, {75: 8, 76: 9}[attribute])

    def cuDeviceGetName(self, out: Any, *_: object) -> int:
        out.value = b"Fake RTX"
        return 0

    @staticmethod
    def _set(out: Any, value: int) -> int:
        out._obj.value = value
        return 0


def with_driver(monkeypatch: pytest.MonkeyPatch, fake: FakeDriver | None) -> None:
    def load(name: str) -> Any:
        if fake is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return fake

    monkeypatch.setattr(driver.ctypes, "CDLL", load)


def with_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str | None, cuda: int = 13) -> None:
    def load(name: str) -> Any:
        if name == "tensorrt" and version is None:
            raise ImportError("libnvinfer.so.11: cannot open shared object file")
        return SimpleNamespace(__version__=version) if name == "tensorrt" else importlib.import_module(name)

    monkeypatch.setattr(tensorrt_module, "importlib", SimpleNamespace(import_module=load, metadata=importlib.metadata))
    monkeypatch.setattr(tensorrt_module, "_cuda_major", lambda flavor: cuda if flavor == "tensorrt" else None)


@pytest.mark.parametrize(
    ("fake", "version", "expected"),
    {
        "no driver": (None, "11.4.0", "no NVIDIA driver"),
        "a driver that does not start": (FakeDriver(start=999), "11.4.0", "does not start"),
        "a driver that is too old": (FakeDriver(cuda=12040), "11.4.0", "Update the driver"),
        "no library": (FakeDriver(), None, "libnvinfer.so.11"),
        "an old library": (FakeDriver(), "8.6.1", "too old"),
    }.values(),
)
def test_tensorrt_says_what_is_missing_and_how_to_get_it(
    fake: FakeDriver | None, version: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_driver(monkeypatch, fake)
    with_tensorrt(monkeypatch, version)
    with pytest.raises(MissingDependencyError, match=expected):
        choose_flavor("tensorrt")
    flavor, reason = choose_flavor("auto")
    assert flavor == "rtx"
    assert expected in reason


def test_auto_takes_tensorrt_where_it_can_build(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver())
    with_tensorrt(monkeypatch, "11.4.0")
    assert choose_flavor("auto")[0] == "tensorrt"


def test_the_driver_is_read_without_loading_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver(cuda=13020))
    assert driver.require_gpu(why="x") == driver.Gpu("Fake RTX", "sm89", (13, 2))
    with pytest.raises(MissingDependencyError, match="no GPU 1"):
        driver.require_gpu(1, why="x")
    assert ctypes is driver.ctypes


def other_output(model: onnx.ModelProto) -> None:
    cast = model.graph.node.pop()
    model.graph.output[0].name = cast.input[0]
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64


def other_size(model: onnx.ModelProto) -> None:
    text = next(entry for entry in model.metadata_props if entry.key == ONNX_KEY)
    text.value = json.dumps(json.loads(text.value) | {"image_size_hw": [32, 32]})


def other_batch(model: onnx.ModelProto) -> None:
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


@pytest.mark.parametrize("change", [other_output, other_size, other_batch])
def test_a_file_that_is_not_what_its_metadata_say_is_refused(change: Any, small: Path, tmp_path: Path) -> None:
    model = onnx.load(small)
    change(model)
    onnx.save(model, tmp_path / "net.onnx")
    result = build("net.onnx", "--reference", small.with_name("best.pt"), "-o", "s.plan", cwd=tmp_path)
    assert result.returncode == 2
    assert "changed after its export" in result.stderr
    assert not list(tmp_path.glob("*.plan*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"channel_order": "rgb"}, "1x64x96, rgb) than the ONNX file (1x64x96, bgr)"),
        ({"image_size_hw": (32, 64)}, "1x32x64"),
        ({"classes": SCENES.classes[::-1]}, "other classes"),
    ],
)
def test_a_reference_for_other_frames_or_classes_is_refused(
    changes: dict[str, Any], expected: str, small: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(small.with_name("best.pt"))
    export_onnx(checkpoint.build(), checkpoint.metadata.replace(**changes), tmp_path / "other.onnx")
    result = build(small, "--reference", "other.onnx", "-o", "s.plan", cwd=tmp_path)
    assert result.returncode == 2
    assert expected in result.stderr
    assert not list(tmp_path.glob("*.plan*"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--reference", "none.pt"], "none.pt"), (["--data", "folder:data"], "classes are not those of folder:data")],
)
def test_what_the_comparison_needs_is_looked_at_before_building(
    flags: list[str], expected: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicsd_deploy.export.engine.build_engine", lambda *_: pytest.fail("it was built"))
    write_folder_dataset(tmp_path / "data")
    result = build(small, *flags, "-o", "s.plan", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr


def test_quantised_without_zero_points_is_unsigned_and_refused(small: Path, tmp_path: Path) -> None:
    model = onnx.load(quantise(small, tmp_path / "int8.onnx", **SYMMETRIC))
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            del node.input[2:]
    onnx.save(model, tmp_path / "net.onnx")
    result = build("net.onnx", "--int8", "--reference", small.with_name("best.pt"), "-o", "s.plan", cwd=tmp_path)
    assert result.returncode == 2
    assert "asymmetrically" in result.stderr


def test_a_graph_that_tensorrt_cannot_parse_names_the_node(small: Path, tmp_path: Path) -> None:
    model = onnx.load(small)
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    node.op_type = "Nonsense"
    with pytest.raises(InputError, match=node.name):
        build_engine(model, "rtx", BuildOptions())
    assert any(entry.key == ONNX_KEY for entry in model.metadata_props)
