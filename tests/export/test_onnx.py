"""The exported graph does what the checkpoint does at every size, or it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import CLASSES, call_script, random_checkpoint
from torch import nn
from torchvision.ops import DeformConv2d

from aicsd_deploy.checkpoint import Checkpoint
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.export.onnx_export import OPSET, export_onnx, fuse_batch_norm
from aicsd_deploy.export.verify import Agreement, compare, frames_for_comparison, require_agreement
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models import build_model
from aicsd_deploy.models.deploy import DeployModule, Normalize
from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.runtime.frames import resize_image
from aicsd_deploy.runtime.torch_backend import TorchBackend


def frames(count: int = 4) -> list[np.ndarray]:
    return frames_for_comparison(open_dataset("synthetic", "val"), count=count)


def test_normalize_is_the_textbook_formula() -> None:
    metadata = Metadata("m", CLASSES, (4, 4))
    image = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (metadata.mean, metadata.std))
    torch.testing.assert_close(Normalize(metadata)(image), (image / 255 - mean) / std, rtol=1e-4, atol=1e-5)


def test_channel_order_is_honoured() -> None:
    class Reddest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x  # three classes: the strongest of red, green and blue

    frame = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    frame[..., 0] = 255
    for order, label in (("rgb", 0), ("bgr", 2)):
        metadata = Metadata("m", CLASSES, (2, 2), channel_order=order, mean=(0, 0, 0), std=(1, 1, 1))
        assert DeployModule(Reddest(), metadata)(frame).unique().tolist() == [label]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deeplabv3plus_mobilenetv2", "lraspp_mobilenetv2", "lraspp_resnet18"])
@pytest.mark.parametrize("dynamic", [(), ("batch", "size")])
def test_exported_networks_agree_with_their_checkpoints(model: str, dynamic: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", model)
    metadata = checkpoint.metadata.replace(dynamic=dynamic)
    export_onnx(checkpoint.build(), metadata, tmp_path / "c.onnx")
    with (
        open_backend(tmp_path / "c.pt", device="cpu") as ours,
        open_backend(tmp_path / "c.onnx", device="cpu") as theirs,
    ):
        assert theirs.metadata == metadata
        agreement = compare(ours, theirs, frames())
        require_agreement(agreement, what="the file")
        assert len(agreement.by_size) == (3 if dynamic else 1)
        assert (
            len({label for frame in frames() for label in np.unique(theirs.infer(resize_image(frame, (64, 96))[None]))})
            > 2
        )
        if not dynamic:
            with pytest.raises(InputError, match="64x96"):
                theirs.infer(np.zeros((1, 32, 32, 3), np.uint8))
            with pytest.raises(InputError, match="one frame at a time"):
                theirs.infer(np.zeros((2, 64, 96, 3), np.uint8))
    graph = onnx.load(tmp_path / "c.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert [i.type.tensor_type.elem_type for i in (*graph.input, *graph.output)] == [onnx.TensorProto.UINT8] * 2


def test_batch_norm_folding_keeps_the_values() -> None:
    torch.manual_seed(0)
    network = build_model("lraspp_mobilenetv2", num_classes=3)
    network.train()
    x = torch.randn(4, 3, 64, 64)
    network(x)
    network.eval()
    with torch.no_grad():
        before = network(x)
        fuse_batch_norm(network)
        torch.testing.assert_close(network(x), before, rtol=1e-3, atol=1e-4)
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


class Standardised(nn.Conv2d):
    """As timm's StdConv2d: the weight is standardised on its way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight / self.weight.std(dim=(1, 2, 3), keepdim=True), self.bias)


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the activation is part of it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(("convolution", "normalisation"), [(Standardised, nn.BatchNorm2d), (nn.Conv2d, Activated)])
def test_subclasses_that_do_more_are_not_folded(
    convolution: type[nn.Conv2d], normalisation: type[nn.BatchNorm2d]
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(convolution(3, 4, 3), normalisation(4)).eval()
    torch.nn.init.normal_(network[1].weight)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = network(x)
        fuse_batch_norm(network)
        torch.testing.assert_close(network(x), before)


def normalised_otherwise(num_classes: int) -> nn.Module:
    """Convolutions that compute their weight, in the new way and the old one, and statistics of the batch at hand."""
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, 4, 1)),
        nn.BatchNorm2d(8),
        nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, num_classes, 1),
        nn.BatchNorm2d(num_classes, track_running_stats=False),
    )


def test_normalisations_that_cannot_be_folded_are_exported_as_they_are(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", "test_onnx:normalised_otherwise")
    export_onnx(checkpoint.build(), checkpoint.metadata, tmp_path / "c.onnx")
    with open_backend(tmp_path / "c.pt", device="cpu") as ours, open_backend(tmp_path / "c.onnx", device="cpu") as both:
        assert compare(ours, both, frames()).share > 0.999


@pytest.mark.slow
def test_a_network_that_exports_wrongly_is_refused(tmp_path: Path) -> None:
    # PSPNet's pooling is baked for the size of the example: it exports and runs, and is wrong at every other size.
    pytest.importorskip("segmentation_models_pytorch")
    random_checkpoint(tmp_path / "psp.pt", "smp:PSPNet:resnet18", (96, 96))
    result = call_script("export/to_onnx.py", "psp.pt", "-o", "psp.onnx", "--dynamic", "size", cwd=tmp_path)
    refused_by_the_gate = result.returncode == 3 and "does not do what the checkpoint does" in result.stderr
    not_exportable = result.returncode == 2 and "cannot export" in result.stderr
    assert refused_by_the_gate or not_exportable, result.stderr
    assert not list(tmp_path.glob("*.onnx"))
    assert not list(tmp_path.glob(".psp*"))


class Deciding(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images if images.mean() > 0 else -images)


@pytest.mark.parametrize(
    ("dynamic", "opset", "says"),
    [
        ((), OPSET, r"data-dependent .* You can change that in the network\.$"),
        (("size",), OPSET + 2, "You can leave out --dynamic size or leave out --opset 20 or change"),
    ],
)
def test_a_network_that_cannot_be_exported_is_refused_with_what_would_help(
    dynamic: tuple[str, ...], opset: int, says: str, tmp_path: Path
) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", "test_onnx:Deciding")
    with pytest.raises(InputError, match=says):
        export_onnx(checkpoint.build(), checkpoint.metadata.replace(dynamic=dynamic), tmp_path / "c.onnx", opset=opset)


class Deforming(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = DeformConv2d(3, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images, images[:, :2])


def test_an_operator_that_is_newer_than_the_operator_set_is_named(tmp_path: Path) -> None:
    network = build_model("test_onnx:Deforming", num_classes=len(CLASSES))
    checkpoint = Checkpoint(Metadata("test_onnx:Deforming", CLASSES, (64, 96)), network.state_dict())
    with pytest.raises(InputError, match=r"No Op registered for DeformConv.* such as --opset 20"):
        export_onnx(checkpoint.build(), checkpoint.metadata, tmp_path / "c.onnx")
    export_onnx(checkpoint.build(), checkpoint.metadata, tmp_path / "c.onnx", opset=20)


def test_a_size_that_one_of_the_two_cannot_take_fails_the_gate(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(trained))  # where the network is

    class Picky(TorchBackend):
        def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
            if frames_NHWC.shape[1] == 64:
                raise InputError("it cannot run on frames of 64x64.")
            return super().infer(frames_NHWC)

    path = trained / "runs/student/best.pt"
    with (
        open_backend(path, device="cpu") as ours,
        Picky.open(path, device="cpu") as theirs,
        pytest.raises(VerificationError, match=r"64x64\. It was not kept\. Export without --dynamic size"),
    ):
        compare(ours, theirs, frames())


@pytest.mark.parametrize("channels", ["bgr", "rgb"])
def test_both_channel_orders_pass_the_gate_and_label_alike(channels: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.onnx"
    result = call_script("export/to_onnx.py", "runs/student/best.pt", "-o", out, "--channels", channels, cwd=trained)
    assert result.returncode == 0, result.stderr
    frame = np.full((1, 48, 64, 3), (190, 70, 50), np.uint8)  # blue, green, red: the class "blue"
    with open_backend(out) as backend:
        assert backend.metadata.channel_order == channels
        labels = backend.infer(frame if channels == "bgr" else np.ascontiguousarray(frame[..., ::-1]))
    assert (labels == 2).mean() > 0.9


def test_the_gate_names_the_worst_size_and_classes(trained: Path) -> None:
    with open_backend(trained / "runs/student/best.pt") as ours:

        class Wrong(type(ours)):  # type: ignore[misc]
            def __init__(self) -> None:
                self.metadata, self.name, self.device = ours.metadata.replace(dynamic=()), "wrong", "cpu"

            def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
                labels = ours.infer(frames_NHWC)
                labels[:, :2] = (labels[:, :2] + 1) % 3
                return labels

        dataset = open_dataset(f"folder:{trained / 'data'}", "val")
        agreement = compare(ours, Wrong(), frames_for_comparison(dataset, count=2))
    assert agreement.share == pytest.approx(46 / 48)
    with pytest.raises(VerificationError, match=r"48x64 they agree on 95\.83 %.*kept\. Report"):
        require_agreement(agreement, what="x.onnx")


def test_every_size_must_agree() -> None:
    by_class = {"road": 0.999, "sky": None, "pole": 0.2, "tree": 0.9, "car": 0.99}
    agreement = Agreement(0.999, {"32x64": 0.9995, "64x96": 0.98}, by_class, ("road", 0.9), frames=4)
    with pytest.raises(VerificationError, match=r"at 64x96 .* 98\.00 %.*pole 20\.0 %, tree 90\.0 %, car 99\.0 %\)"):
        require_agreement(agreement, what="x.onnx")
    require_agreement(replace(agreement, by_size={"32x64": 0.9995, "64x96": 0.996}), what="x.onnx")


def test_a_network_that_sees_one_class_is_said_to_prove_little(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(f"folder:{trained / 'data'}", "val")
    with open_backend(trained / "runs/student/best.pt") as ours:
        images = frames_for_comparison(dataset, count=2)
        require_agreement(compare(ours, ours, images), what="x.onnx")
        assert "warning" not in capsys.readouterr().err
        monkeypatch.setattr(ours, "infer", lambda frames_NHWC: np.ones(frames_NHWC.shape[:3], np.uint8))
        require_agreement(compare(ours, ours, images), what="x.onnx")
    assert f"100.0 % of these pixels {dataset.classes[1].name!r}" in capsys.readouterr().err


def test_a_failed_gate_leaves_no_file_and_exit_code_3(trained: Path, tmp_path: Path) -> None:
    program = tmp_path / "broken_export.py"
    program.write_text(
        "import runpy, sys\n"
        "from aicsd_deploy.models import deploy\n"
        "good = deploy.DeployModule.forward\n"
        "import aicsd_deploy.export.onnx_export as e\n"
        "class Broken(deploy.DeployModule):\n"
        "    def forward(self, frames_NHWC):\n"
        "        return 2 - good(self, frames_NHWC)\n"
        "e.DeployModule = Broken\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    import os
    import subprocess
    import sys

    from helpers import REPO

    result = subprocess.run(
        [sys.executable, program, REPO / "export/to_onnx.py", "runs/student/best.pt", "-o", tmp_path / "b.onnx"],
        cwd=trained,
        capture_output=True,
        text=True,
        env={**os.environ, "AICSD_TRUST": "tiny_network:tiny"},
        check=False,
    )
    assert result.returncode == 3, result.stderr
    assert "does not do what the checkpoint does" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken_export.py"]
