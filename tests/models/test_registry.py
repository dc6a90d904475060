"""The networks: sizes, strides, backbone weights, and names that lead to none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from aicsd_deploy.errors import InputError
from aicsd_deploy.models import MODEL_NAMES, backbone_parameters, build_model

PAPER_MILLIONS = {"deeplabv3plus_resnet101": 59.3, "deeplabv3plus_resnet18": 16.6}


@pytest.mark.parametrize("name", PAPER_MILLIONS)
def test_parameters_are_the_papers(name: str) -> None:
    parameters = sum(p.numel() for p in build_model(name, num_classes=21).parameters())
    assert parameters / 1e6 == pytest.approx(PAPER_MILLIONS[name], rel=0.01)


def test_mobilenetv2_stores_the_papers_number_of_values() -> None:
    # 5.82 M trainable; with the statistics of batch normalisation 5.85 M, which is what rounds to the published 5.9 M.
    model = build_model("deeplabv3plus_mobilenetv2", num_classes=21)
    assert sum(v.numel() for v in model.state_dict().values()) / 1e6 == pytest.approx(5.9, rel=0.01)


@pytest.mark.parametrize("name", [*MODEL_NAMES, "smp:DeepLabV3Plus:resnet18", "smp:Unet:resnet18", "smp:FPN:resnet18"])
def test_logits_come_at_the_networks_own_stride(name: str) -> None:
    if name.startswith("smp:"):
        pytest.importorskip("segmentation_models_pytorch")
    model = build_model(name, num_classes=5).eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 64, 96))
    stride = 1 if "Unet" in name else 8 if name.startswith("lraspp") else 4
    assert logits.shape == (1, 5, 64 // stride, 96 // stride)
    assert any(True for _ in backbone_parameters(model))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenetv2"])
def test_output_stride_is_16(backbone: str) -> None:
    network = build_model(f"lraspp_{backbone}", num_classes=2).eval().backbone
    maps = network(torch.zeros(1, 3, 64, 128))
    assert [(64 // m.shape[2], 128 // m.shape[3]) for m in maps] == [(s, s) for s in network.strides]
    assert [m.shape[1] for m in maps] == list(network.channels)
    assert network.strides[-1] == 16


def test_backbone_weights_are_loaded(tmp_path: Path) -> None:
    from torchvision.models import mobilenet_v2

    original = mobilenet_v2()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    model = build_model("lraspp_mobilenetv2", num_classes=3, backbone_weights=tmp_path / "weights.pth")
    stages = [m for stage in model.backbone.stages for m in stage]
    for ours, theirs in zip(stages, original.features[:18], strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_real_backbone_weights_load(shared: Path) -> None:
    weights = shared / "data/weights/mobilenet_v2_imagenet_dequant_tf2.pth"
    loaded = build_model("deeplabv3plus_mobilenetv2", num_classes=11, backbone_weights=weights)
    fresh = build_model("deeplabv3plus_mobilenetv2", num_classes=11)
    key = "backbone.stages.3.0.conv.0.0.weight"
    assert not torch.equal(loaded.state_dict()[key], fresh.state_dict()[key])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(build_model("lraspp_mobilenetv2", num_classes=2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="missing or of another shape"):
        build_model("lraspp_resnet18", num_classes=2, backbone_weights=tmp_path / "other.pth")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(InputError, match=r"tensors that this network has not, layer1\.2\.conv1\.weight for one"):
        build_model("lraspp_resnet18", num_classes=2, backbone_weights=tmp_path / "deeper.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(InputError, match="loaded safely"):
        build_model("lraspp_resnet18", num_classes=2, backbone_weights=tmp_path / "text.pth")
    with pytest.raises(InputError, match="does not exist"):
        build_model("lraspp_resnet18", num_classes=2, backbone_weights=tmp_path / "none.pth")


@pytest.mark.parametrize(
    "name", ["resnet18", "smp:NoSuchNet:resnet18", "no.such.module:net", "json:nothing", "smp:Unet"]
)
def test_a_name_that_leads_to_no_network_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        build_model(name, num_classes=2)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lraspp_mobilnetv2", "lraspp_mobilenetv2"),
        ("smp:Segformr:resnet34", "segformer"),
        ("smp:Segformer:resnt34", "resnet34"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"Did you mean {meant}\?"):
        build_model(name, num_classes=2)


def test_code_named_by_a_file_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AICSD_TRUST", raising=False)
    with pytest.raises(InputError, match="AICSD_TRUST"):
        build_model("antigravity:fly", num_classes=2, from_artifact=True)
    import sys

    assert "antigravity" not in sys.modules
