"""Teachers from elsewhere: each gives what its own library computes, and its classes are made to fit or refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NETWORK_WITH_BACKBONE, TINY, call_script, write_folder_dataset
from torch import nn

from aicsd_deploy.class_map import RemappedClasses, match_classes
from aicsd_deploy.data.voc import VOC_CLASSES
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.models.published import _their_name, build_published
from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.teachers import open_teacher

CLASSES = tuple(SegClass(name, (i, 0, 0)) for i, name in enumerate(("red", "green", "blue")))
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def save_segformer(folder: Path, labels: list[str] | None = None, **processing: object) -> nn.Module:
    """Write a small random SegFormer as a user has it in a folder; `processing` is what its processor does otherwise."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    names = (
        {}
        if labels is None
        else {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    )
    config = SegformerConfig(
        num_labels=3 if labels is None else len(labels),
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        **names,
    )
    model = SegformerForSemanticSegmentation(config)
    model.save_pretrained(folder)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    SegformerImageProcessor(**statistics | processing).save_pretrained(folder)
    return model.eval()


def test_a_segformer_gives_its_logits_in_our_order_with_its_normalisation(tmp_path: Path) -> None:
    model = save_segformer(tmp_path / "hf", ["Blue", "red", "green"])
    for name in (f"hf:{tmp_path / 'hf'}", str(tmp_path / "hf")):
        teacher = open_teacher(name, CLASSES)
        with torch.no_grad():
            torch.testing.assert_close(teacher.network(IMAGES), model(IMAGES).logits[:, [1, 2, 0]])
    assert teacher.metadata.mean == (0.5, 0.5, 0.5)
    assert teacher.metadata.std == (0.25, 0.25, 0.25)
    assert teacher.known_classes is None
    assert len(teacher.digest) == 64


def test_what_a_processor_does_to_the_pixels_is_done_or_refused(tmp_path: Path) -> None:
    labels = ["red", "green", "blue"]
    save_segformer(tmp_path / "plain", labels, do_normalize=False)
    metadata = open_teacher(f"hf:{tmp_path / 'plain'}", CLASSES).metadata
    assert (metadata.mean, metadata.std) == ((0.0,) * 3, (1.0,) * 3)
    for number, (processing, expected) in enumerate(
        (
            ({"do_rescale": False}, "pixels from 0 to 255"),
            ({"rescale_factor": 1 / 127.5}, "pixels times 0.0078"),
            ({"do_flip_channel_order": True}, "blue, green, red"),
        )
    ):
        save_segformer(tmp_path / str(number), labels, **processing)
        with pytest.raises(InputError, match=rf"{expected}.*package\.module:function"):
            open_teacher(f"hf:{tmp_path / str(number)}", CLASSES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_of_half_precision_is_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_segformer(tmp_path / "hf", ["red", "green", "blue"]).to(dtype)
    model.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    teacher = open_teacher(f"hf:{tmp_path / 'hf'}", CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(IMAGES), model.float()(IMAGES).logits)


def test_a_network_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    """transformers gives a backbone a random head, and says so only on the screen."""
    model = save_segformer(tmp_path / "hf", ["red", "green", "blue"])
    model.segformer.save_pretrained(tmp_path / "hf")  # type: ignore[operator,union-attr]
    with pytest.raises(InputError, match="has no weights for decode_head of SegformerForSemanticSegmentation"):
        open_teacher(f"hf:{tmp_path / 'hf'}", CLASSES)


def test_probabilities_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "softened.py").write_text(
        "from torch import nn\n\ndef network(n):\n    return nn.Sequential(nn.Conv2d(3, n, 1), nn.Softmax(dim=1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="gives probabilities"):
        open_teacher("softened:network", CLASSES)


def test_a_teacher_that_takes_one_size_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_size.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Network(nn.Conv2d):\n    def forward(self, images):\n"
        "        assert images.shape[2:] == (32, 64), 'wrong height or width'\n        return super().forward(images)\n\n\n"
        "def network(n):\n    return Network(3, n, 1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert open_teacher("one_size:network", CLASSES, size_hw=(32, 64)).known_classes is None
    with pytest.raises(InputError, match=r"an image of 128x128: wrong height or width\. .*--image-size"):
        open_teacher("one_size:network", CLASSES)


def test_unnamed_classes_are_taken_in_order_and_another_number_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_segformer(tmp_path / "hf")
    assert open_teacher(f"hf:{tmp_path / 'hf'}", CLASSES).network(IMAGES).shape[1] == 3
    assert "in the order of the data set" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"(?s)3 classes\n.*2 classes: red, green\n.*--class-map"):
        open_teacher(f"hf:{tmp_path / 'hf'}", CLASSES[:2])


def test_two_classes_of_one_name_are_not_matched_by_it() -> None:
    with pytest.raises(InputError, match="--class-map"):
        match_classes(["road", "Road", "sky"], 3, ["sky", "road", "Road"], class_map=None, teacher="t")


def test_a_class_map_merges_and_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("red: [fire, 2]\ngreen: Grass\n")
    groups = match_classes(["grass", "fire", "rust"], 3, ["red", "green", "blue"], class_map=path, teacher="t")
    assert groups == [[1, 2], [0], []]
    logits = torch.randn(2, 3, 4, 4)
    out = RemappedClasses(nn.Identity(), groups)(logits)
    p, q = logits.softmax(1), out.softmax(1)
    torch.testing.assert_close(q[:, 0], p[:, 1] + p[:, 2])
    torch.testing.assert_close(q[:, 1], p[:, 0])
    assert q[:, 2].max() == 0
    for text, expected in (
        ("pink: fire", "no class of the data set"),
        ("red: water", "no class of the teacher"),
        ("red: 3", "no class of the teacher"),
        ("red: -1", "no class of the teacher"),
        ("red: fire", "fewer than two"),
        ("red: yes\ngreen: fire", "True is no class of the teacher"),
        ("red: fire\ngreen: grass\nred: rust", "has 'red' twice"),
        ("red: fire\ngreen: [grass, FIRE]", "'FIRE' twice"),
        ("red: [fire, 1]\ngreen: grass", "1 twice"),
        ("- red", "must hold lines"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=expected):
            match_classes(["grass", "fire", "rust"], 3, ["red", "green", "blue"], class_map=path, teacher="t")


def test_torchvision_and_smp_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import segmentation_models_pytorch as smp
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    torch.save(model.state_dict(), tmp_path / "tv.pth")
    teacher = open_teacher(f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / 'tv.pth'}", VOC_CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(IMAGES), model(IMAGES)["out"])
    with pytest.raises(InputError, match=r"(?s)21 classes: background.*--class-map"):
        open_teacher(f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / 'tv.pth'}", CLASSES)
    named = dict(sorted((f"module.{name}", value) for name, value in model.state_dict().items()))
    torch.save(
        {"model": named, "epoch": 3}, tmp_path / "nested.pth"
    )  # as torchvision's training script, of several GPUs
    teacher = open_teacher(f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / 'nested.pth'}", VOC_CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(IMAGES), model(IMAGES)["out"])
    for content in ({"weights": model.state_dict()}, {0: torch.zeros(1)}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(InputError, match=r"no tensor is named classifier.*state_dict\(\)"):
            open_teacher(f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / 'other.pth'}", VOC_CLASSES)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "tv.pth").read_bytes()[:9999])
    with pytest.raises(InputError, match=r"cut.pth cannot be loaded safely, or is damaged"):
        open_teacher(f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / 'cut.pth'}", VOC_CLASSES)
    with pytest.raises(
        InputError, match=r"state dict of torchvision's fcn_resnet50: .* Missing key.*backbone.conv1.weight"
    ):
        open_teacher(f"torchvision:fcn_resnet50:{tmp_path / 'tv.pth'}", VOC_CLASSES)
    with pytest.raises(InputError, match="no segmentation network 'resnet18'"):
        open_teacher("torchvision:resnet18", CLASSES)
    model = smp.Unet("resnet18", encoder_weights=None, classes=3).eval()
    model.save_pretrained(tmp_path / "smp")
    teacher = open_teacher(f"smp:{tmp_path / 'smp'}", CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(IMAGES), model(IMAGES))
    assert "ImageNet's statistics are taken" in capsys.readouterr().err
    smp.Unet("tu-mobilenetv3_large_100.miil_in21k", encoder_weights=None, classes=3).save_pretrained(tmp_path / "timm")
    metadata = open_teacher(f"smp:{tmp_path / 'timm'}", CLASSES).metadata
    assert (metadata.mean, metadata.std) == ((0.0,) * 3, (1.0,) * 3)
    assert "statistics" not in capsys.readouterr().err
    with pytest.raises(InputError, match="save_pretrained"):
        open_teacher("smp:Unet:resnet34", CLASSES)
    model = smp.FPN("resnet18", encoder_weights=None, classes=3, activation="softmax2d").eval()
    model.save_pretrained(tmp_path / "softmax")
    with torch.no_grad():
        logits = open_teacher(f"smp:{tmp_path / 'softmax'}", CLASSES).network(IMAGES)
        torch.testing.assert_close(logits.softmax(dim=1), model(IMAGES))


def published_state(classes: int) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """A checkpoint in the format of the paper's teachers, ResNet-50, with random weights; and our network that it was made from."""
    from aicsd_deploy.models.backbones import resnet
    from aicsd_deploy.models.deeplab import DeepLabV3Plus

    torch.manual_seed(0)
    network = DeepLabV3Plus(resnet(50), classes)
    state = {_their_name(k): v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    return state, network


def test_the_papers_checkpoint_format(tmp_path: Path) -> None:
    state, ours = published_state(21)
    expected_names = {
        "backbone.conv1.weight", "backbone.bn1.running_mean", "backbone.layer1.0.conv3.weight", "backbone.layer4.2.bn3.bias",
        "backbone.layer2.0.downsample.0.weight", "aspp.aspp1.atrous_conv.weight", "aspp.aspp4.bn.running_var",
        "aspp.global_avg_pool.1.weight", "aspp.global_avg_pool.2.bias", "aspp.conv1.weight", "aspp.bn1.weight",
        "decoder.conv1.weight", "decoder.bn1.weight", "decoder.last_conv.0.weight", "decoder.last_conv.1.weight",
        "decoder.last_conv.4.weight", "decoder.last_conv.5.weight", "decoder.last_conv.8.weight", "decoder.last_conv.8.bias",
    }  # fmt: skip
    assert expected_names <= state.keys()
    assert not any(re.match(r"backbone\.stages|aspp\.(branches|pool|project)|low_level|classifier", k) for k in state)
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "best_pred": np.float64(0.7)}, path
    )
    teacher = open_teacher(str(path), VOC_CLASSES)
    for name, value in teacher.network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, ours.state_dict()[name]), name
    dilations = [block.conv2.dilation[0] for block in teacher.network.backbone.stages[3]]  # type: ignore[union-attr]
    assert dilations == [2, 4, 8]
    coarse: list[torch.Tensor] = []
    teacher.network.classifier.register_forward_hook(lambda *about: coarse.append(about[2]))  # type: ignore[union-attr]
    logits = teacher.network(IMAGES[:1, :, :33, :33])
    assert logits.shape == (1, 21, 33, 33)
    torch.testing.assert_close(logits[..., ::4, ::4], coarse[0], msg="logits are upsampled with aligned corners")
    del state["aspp.conv1.weight"]
    with pytest.raises(InputError, match=r"1 tensors are missing.*aspp\.conv1\.weight"):
        build_published(state, origin="x.pth")
    with pytest.raises(InputError, match="ResNet-50 or ResNet-101"):
        build_published({k: v for k, v in state.items() if "layer3.5" not in k}, origin="x.pth")


@pytest.mark.parametrize("text", ["train me", "best.pt", "Resnet weights", "a: b"])
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"teacher\.pt is no checkpoint"):
        open_teacher(str(path), CLASSES)


def test_distilling_from_a_segformer_and_from_own_code(tmp_path: Path) -> None:
    write_folder_dataset(tmp_path / "data")
    save_segformer(tmp_path / "hf", ["red", "green", "blue"])
    (tmp_path / "small_network.py").write_text(NETWORK_WITH_BACKBONE)
    common = [*TINY, "--epochs", 1]
    for number, arguments in enumerate(
        (
            ["--teacher", "hf:hf", "--student", "deeplabv3plus_resnet18", "--image-size", "64x64"],
            ["--teacher", "hf:hf", "--student", "small_network:small", "--method", "ickd"],
            ["--teacher", "small_network:small", "--model", "small_network:small", "--method", "at"],
        )
    ):
        result = call_script("train/distill.py", *common, *arguments, "--out", f"s{number}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "teacher's val mIoU" in result.stderr
    result = call_script("train/distill.py", *common, *arguments, "--out", "s2", "--resume", "auto", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_teacher_of_fewer_classes_and_other_names_through_the_command(tmp_path: Path) -> None:
    write_folder_dataset(tmp_path / "data")
    save_segformer(tmp_path / "hf", ["grass", "fire"])
    (tmp_path / "small_network.py").write_text(NETWORK_WITH_BACKBONE)
    (tmp_path / "map.yaml").write_text("red: fire\ngreen: grass\n")
    arguments = [*TINY, "--epochs", 1, "--student", "small_network:small", "--teacher", "hf:hf", "--out", "s"]
    result = call_script("train/distill.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "--class-map" in result.stderr
    result = call_script("train/distill.py", *arguments, "--class-map", "map.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "does not know blue" in result.stderr


def test_a_network_from_elsewhere_is_exported_and_then_runs_as_any_other(tmp_path: Path) -> None:
    write_folder_dataset(tmp_path / "data")
    model = save_segformer(tmp_path / "hf", ["Blue", "red", "green"])
    exporting = ["export/to_onnx.py", "hf:hf", "--image-size", "64x96"]
    result = call_script(*exporting, cwd=tmp_path)
    assert result.returncode == 2
    assert "--data SPEC" in result.stderr
    result = call_script(*exporting, "--data", "folder:data", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    rgb_BCHW = torch.from_numpy(frame[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = model((rgb_BCHW - 0.5) / 0.25).logits[:, [1, 2, 0]]
    expected = nn.functional.interpolate(logits, (64, 96), mode="bilinear")[0].argmax(dim=0)
    with open_backend(tmp_path / "teacher.onnx", device="cpu") as backend:
        assert backend.metadata.class_names == ["red", "green", "blue"]
        assert backend.metadata.method == "elsewhere"
        assert (backend.infer(frame[None])[0] == expected.numpy()).mean() > 0.999
    result = call_script("train/evaluate.py", "teacher.onnx", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = call_script("train/evaluate.py", "hf:hf", cwd=tmp_path)
    assert result.returncode == 2
    assert "export/to_onnx.py hf:hf" in result.stderr
