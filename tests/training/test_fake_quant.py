"""INT8 imitated in training: the arithmetic, that it is what the INT8 file does, and that a run leaves an ordinary network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import TINY, call_script, random_checkpoint
from onnx import numpy_helper
from torch import nn

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.export.onnx_export import export_onnx
from aicsd_deploy.export.quantize import Quantizer
from aicsd_deploy.export.verify import compare, frames_for_comparison
from aicsd_deploy.models.deploy import DeployModule
from aicsd_deploy.runtime.frames import as_input, resize_image
from aicsd_deploy.runtime.ort_backend import OrtBackend
from aicsd_deploy.runtime.torch_backend import TorchBackend
from aicsd_deploy.training.fake_quant import imitate_int8, rounded_activation, rounded_weight

CPU = torch.device("cpu")


def shallow(num_classes: int) -> nn.Module:
    """Through few layers, a value that floats round to the other side changes no more than the pixel it belongs to."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, num_classes, 1),
    )  # fmt: skip


class Tokens(nn.Module):
    """Linear layers over patches, as in transformers; Hardtanh gives what they read the same range in the file and in training."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.Sequential(
            nn.LayerNorm(16),
            nn.Hardtanh(),
            nn.Linear(16, 32),
            nn.LayerNorm(32),
            nn.Hardtanh(),
            nn.Linear(32, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.patches(images)
        logits: torch.Tensor = self.layers(maps.flatten(2).transpose(1, 2))
        return logits.transpose(1, 2).unflatten(2, maps.shape[2:])


def test_weights_are_rounded_per_output_channel_and_pass_gradients_on() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-3, 50, 0.0]).view(4, 1, 1, 1)  # fmt: skip
    weight.requires_grad_()
    rounded = rounded_weight(weight)
    values = weight.detach().numpy()
    scale = np.abs(values).max(axis=(1, 2, 3), keepdims=True) / 127
    expected = np.round(values / np.where(scale == 0, 1, scale)) * scale
    np.testing.assert_allclose(rounded.detach().numpy(), expected, rtol=1e-5)
    rounded.sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad == 1).all())


@pytest.mark.parametrize(
    ("symmetric", "scale", "expected"),
    [(False, 4.0 / 255, [-1.0, 0.0, 0.5, 3.0]), (True, 3.0 / 127, [-1.0, 0.0, 0.5, 3.0])],
)
def test_activations_are_rounded_and_cut_off(symmetric: bool, scale: float, expected: list[float]) -> None:
    values = torch.tensor([-1.0, 0.0, 0.5, 9.0], requires_grad=True)
    rounded = rounded_activation(values, torch.tensor([-1.0, 3.0]), symmetric=symmetric)
    assert rounded.tolist() == pytest.approx(expected, abs=scale)
    assert torch.allclose(rounded / scale, (rounded / scale).round(), atol=1e-3), "on the grid of eight bits"
    assert rounded[1] == 0, "zero stays zero, as padding needs it"
    rounded.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 1, 1, 0], "no gradient from what is cut off"


@pytest.mark.parametrize("network", ["shallow", "Tokens"])
def test_the_imitation_labels_as_the_int8_file_does(network: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", f"test_fake_quant:{network}")
    export_onnx(checkpoint.build(), checkpoint.metadata, tmp_path / "c.onnx")
    size = checkpoint.metadata.image_size_hw
    frames = [resize_image(f, size) for f in frames_for_comparison(open_dataset("synthetic", "train"), count=4)]
    quantizer = Quantizer(tmp_path / "c.onnx", frames, target="tensorrt")
    quantizer.write(tmp_path / "q.onnx", method="minmax", notes={})
    quantizer.close()
    imitating = checkpoint.build()
    ranges = imitate_int8(imitating, symmetric=True)
    with torch.no_grad():
        pixels = torch.from_numpy(np.concatenate([as_input(frame, checkpoint.metadata) for frame in frames]))
        DeployModule(imitating, checkpoint.metadata).train()(pixels)
    layers = [module for module in imitating.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    scales = [input_scale(onnx.load(tmp_path / "q.onnx"), module.weight) for module in layers]
    assert [low_high.abs().max().item() / 127 for low_high in ranges.values()] == pytest.approx(scales, rel=0.01)
    imitated = TorchBackend(imitating, checkpoint.metadata, device=CPU)
    plain = TorchBackend(checkpoint.build(), checkpoint.metadata, device=CPU)
    with OrtBackend(tmp_path / "q.onnx") as int8:
        off, off_without = (1 - compare(int8, other, frames, sizes=[size]).share for other in (imitated, plain))
    assert off < 0.02
    assert off < off_without / 2


def input_scale(model: onnx.ModelProto, weight: torch.Tensor) -> float:
    """Return the scale of a layer's input in a Q/DQ file; the layer is found by its weight."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    highest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    ours = (rounded_weight(weight) / highest * 127).abs().detach().numpy()
    if ours.ndim == 2:  # the file has (in, out)
        ours = ours.T
    distances = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul"):
            values, weights = (made_by[name] for name in node.input[:2])
            theirs = np.abs(constants[weights.input[0]].astype(np.float32))
            distance = np.abs(theirs - ours).mean() if theirs.shape == ours.shape else np.inf
            distances[float(distance)] = float(constants[values.input[1]])
    return distances[min(distances)]


def test_the_state_dict_and_the_statistics_stay_those_of_the_float_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ranges = imitate_int8(network, symmetric=False)
    network.train()
    network(torch.linspace(-1, 2, 2 * 3 * 5 * 5).view(2, 3, 5, 5)).sum().backward()
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert ranges["input_range_0"].tolist() == [-1, 2]
    assert network[1].weight.grad is not None, "scale and shift go on learning"


def test_what_lies_outside_the_range_is_cut_off_and_zero_stays_zero() -> None:
    values = torch.tensor([-3.0, 0.0, 0.25, 3.0])
    signed = rounded_activation(values, torch.tensor([-1.0, 0.5]), symmetric=True)
    assert signed.tolist() == pytest.approx([-1, 0, round(0.25 * 127) / 127, 1])
    unsigned = rounded_activation(values, torch.tensor([0.2, 1.0]), symmetric=False)
    assert unsigned.tolist() == pytest.approx([0, 0, round(0.25 * 255) / 255, 1])


def test_a_range_is_a_running_mean_of_what_training_shows() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1))
    (low_high,) = imitate_int8(network, symmetric=False).values()

    def show(low: float, high: float) -> None:
        network(torch.tensor([low, high]).view(1, 1, 1, 2))

    network.train()
    show(-1, 2)
    assert low_high.tolist() == [-1, 2], "the first batch is all that is known"
    show(-3, 12)
    assert low_high.tolist() == pytest.approx([-1.1, 2.5]), "one batch in twenty"
    show(0, 0)
    assert low_high.tolist() == pytest.approx([-1.045, 2.375])
    network.eval()
    show(-100, 100)
    assert low_high.tolist() == pytest.approx([-1.045, 2.375]), "validation changes nothing"
    network.train()
    for _ in range(200):
        show(0, 1)
    assert low_high.tolist() == pytest.approx([0, 1], abs=1e-3), "old batches are forgotten"


def test_qat_goes_on_with_a_student_and_leaves_an_ordinary_checkpoint(trained: Path, tmp_path: Path) -> None:
    student, out = trained / "runs/student", tmp_path / "qat"
    flags = [
        "--data",
        "folder:data",
        "--batch-size",
        4,
        "--threads",
        1,
        "--epochs",
        2,
        "--teacher",
        "runs/teacher/best.pt",
    ]
    result = call_script("train/distill.py", "--qat", *flags, "--out", out, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert "with INT8 imitated" in result.stderr + result.stdout
    before, after = load_checkpoint(student / "best.pt"), load_checkpoint(out / "best.pt")
    assert list(before.model) == list(after.model)
    changed = {name for name in before.model if not torch.equal(before.model[name], after.model[name])}
    assert changed
    assert not {name for name in changed if "running" in name}
    assert after.metadata.provenance["init"] == "runs/student/best.pt"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["config"]["qat"] == "cpu"
    assert summary["config"]["lr"] == 1e-4
    result = call_script("export/to_onnx.py", out / "best.pt", "-o", tmp_path / "q.onnx", cwd=trained)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qat", "--sync-bn"], "takes neither"),
        (["--init", "missing.pt"], "does not exist"),
        (["--init", "runs/student/best.pt", "--student", "lraspp_resnet18"], "starts from its own weights only"),
        (["--init", "runs/student/best.pt", "--data", "synthetic", "--method", "none"], "this data has"),
        (["--qat", "--data", "synthetic", "--method", "none"], "goes on with a trained student"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(flags: list[str], message: str, trained: Path, tmp_path: Path) -> None:
    data = [] if "--data" in flags else TINY[:2]
    teacher = [] if "none" in flags else ["--teacher", "runs/teacher/best.pt"]
    result = call_script("train/distill.py", *data, *teacher, *flags, "--out", tmp_path / "out", cwd=trained)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
