"""Teachers from anywhere: our checkpoints, transformers, torchvision, segmentation_models_pytorch, the paper's, your own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.class_map import RemappedClasses, match_classes
from aicsd_deploy.console import say
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.data.voc import VOC_CLASSES
from aicsd_deploy.errors import InputError, MissingDependencyError, first_line
from aicsd_deploy.files import existing_file, sha256
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.models.published import build_published, state_of_published
from aicsd_deploy.models.registry import load_callable


@dataclass(frozen=True)
class Teacher:
    """A network to learn from, made to fit the student's classes.

    Attributes:
        name: what the user called it.
        network: normalised images (B, 3, H, W) to logits (B, C, h, w) in the order of the student's classes; float32, in eval mode.
        metadata: its normalisation and the student's classes; the image size is the one it was trained at, where it says one.
        digest: SHA-256 of its file, or of its weights.
        known_classes: the student's classes that it knows; None: all.
    """

    name: str
    network: nn.Module
    metadata: Metadata
    digest: str
    known_classes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Found:
    """A network as its source has it; class names are None where the source does not say them."""

    network: nn.Module
    class_names: list[str] | None
    metadata: Metadata
    digest: str | None = None


def open_teacher(
    name: str,
    classes: tuple[SegClass, ...],
    *,
    class_map: Path | None = None,
    from_artifact: bool = False,
    size_hw: tuple[int, int] | None = None,
) -> Teacher:
    """Load a teacher and make it fit the student's classes.

    Args:
        name: a checkpoint of train/teacher.py, or the paper's DeepLabV3+ checkpoint; hf:NAME or hf:FOLDER (transformers; a folder
            with a config.json needs no hf:);
            torchvision:NAME or torchvision:NAME:WEIGHTS.pth; smp:FOLDER (save_pretrained of segmentation_models_pytorch);
            package.module:function.
        classes: the student's classes.
        class_map: a file that says which classes of the teacher are which of the student; see `match_classes`.
        from_artifact: the name was read from a file and not given by the user; see `build_model`.
        size_hw: a size of pictures that it is to take; its classes are counted with one. None: 128x128.

    Raises:
        InputError: there is no such teacher, it cannot be loaded safely, or its classes cannot be those of the student.
        MissingDependencyError: the library it comes from is not installed.
    """
    kind, _, rest = name.partition(":")
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        found = _from_transformers(str(path))
    elif path.exists() or not rest:
        found = _from_file(path)
    elif kind == "hf":
        found = _from_transformers(str(Path(rest).expanduser()))
    elif kind == "torchvision":
        found = _from_torchvision(rest)
    elif kind == "smp":
        found = _from_smp(rest)
    else:
        found = _Found(
            LogitsOf(load_callable(name, len(classes), from_artifact=from_artifact)), None, _plain_metadata(name)
        )
    network = found.network.float().eval()  # files of half precision: the run chooses its own (`--precision`)
    count = (
        len(found.class_names)
        if found.class_names is not None
        else _count_classes(network, name, size_hw or (128, 128))
    )
    groups = match_classes(found.class_names, count, [c.name for c in classes], class_map=class_map, teacher=name)
    if groups is not None:
        network = RemappedClasses(network, groups).eval()
    known = None if groups is None or all(groups) else tuple(i for i, group in enumerate(groups) if group)
    metadata = found.metadata.replace(classes=classes, role="teacher")
    return Teacher(name, network, metadata, found.digest or _digest(network), known)


def is_from_elsewhere(name: str) -> bool:
    """Return whether a name is that of a network that this toolkit did not train, as `open_teacher` takes them."""
    path = Path(name).expanduser()
    if path.is_file():
        return state_of_published(_content(path)) is not None
    return (path / "config.json").is_file() if path.exists() else ":" in name


def open_alone(
    name: str, data: str | None, *, class_map: Path | None = None, size_hw: tuple[int, int] | None = None
) -> Teacher:
    """Load a network from elsewhere to run it, not to learn from it: with the classes of a data set and a size of its own.

    Args:
        name: see `open_teacher`.
        data: the data set that has its classes, as `open_dataset` takes it.
        class_map: see `open_teacher`.
        size_hw: the size of the frames that it is to work on; None takes that of the data set's first image.

    Raises:
        InputError: as of `open_teacher`, or no data set is named.
    """
    if data is None:
        raise InputError(
            f"{name} does not say which classes it is to give. Name a data set that has them: --data SPEC."
        )
    dataset = open_dataset(data, "val")
    if size_hw is None:
        height, width, _ = dataset.load(0)[0].shape
        size_hw = height, width
    found = open_teacher(name, dataset.classes, class_map=class_map, size_hw=size_hw)
    return replace(found, metadata=found.metadata.replace(image_size_hw=size_hw, data=data, method="elsewhere"))


class LogitsOf(nn.Module):
    """A network whose output is a dictionary, a tuple or an object of transformers, made to give its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        output = self.model(images_BCHW)
        if isinstance(output, Mapping):
            output = output.get("out", output.get("logits"))
        elif isinstance(output, list | tuple) and output:
            output = output[0]
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise InputError(
                f"The teacher {type(self.model).__name__} must give logits (B, C, h, w), alone or as 'out' or 'logits', not "
                f"{type(output).__name__}{tuple(output.shape) if isinstance(output, Tensor) else ''}."
            )
        return output


def _plain_metadata(name: str) -> Metadata:
    return Metadata(model=name, classes=(), image_size_hw=(0, 0), role="teacher")


def _from_file(path: Path) -> _Found:
    existing_file(path, "The checkpoint")
    state = state_of_published(_content(path))
    if state is not None:
        network = build_published(state, origin=str(path))
        names = (
            [c.name for c in VOC_CLASSES] if state["decoder.last_conv.8.weight"].shape[0] == len(VOC_CLASSES) else None
        )
        return _Found(network, names, _plain_metadata(str(path)), sha256(path))
    try:
        checkpoint = load_checkpoint(path)
    except InputError as error:
        raise InputError(
            f"{error} A network from elsewhere: torchvision:NAME:FILE, smp:FOLDER or hf:FOLDER, or package.module:function, your own "
            "function that loads it."
        ) from error
    return _Found(checkpoint.build(), checkpoint.metadata.class_names, checkpoint.metadata, sha256(path))


def _content(path: Path) -> Any:
    """Return what a torch file holds, or None; nothing in it is run. The released files also hold a score, a NumPy number."""
    numpy_scalar = [
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
        np._core.multiarray.scalar,  # type: ignore[attr-defined]
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
    ]
    try:
        with torch.serialization.safe_globals(numpy_scalar):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file of any other kind makes the unpickler raise whatever it likes
        return None  # `load_checkpoint` says what is wrong with it


def _from_transformers(name: str) -> _Found:
    try:
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    except ImportError as error:
        raise MissingDependencyError(
            f"hf:{name} needs transformers. Install it with: pip install 'aicsd-deploy[models]'"
        ) from error
    try:
        model, loaded = AutoModelForSemanticSegmentation.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever the hub, the network or the files raise
        raise InputError(
            f"hf:{name} cannot be loaded as a semantic-segmentation network of transformers ({type(error).__name__}: "
            f"{first_line(error)}). Give a folder that save_pretrained wrote, or a name on the hub and a network connection."
        ) from error
    missing = set(loaded["missing_keys"])  # transformers fills them with random numbers
    untrained = [
        part
        for part, module in model.named_children()
        if (names := {f"{part}.{name}" for name, _ in module.named_parameters()}) and names <= missing
    ]
    if any(not part.startswith("auxiliary") for part in untrained):  # auxiliary heads serve in training only
        raise InputError(
            f"hf:{name} has no weights for {', '.join(untrained)} of {type(model).__name__}: it is a backbone or a network of "
            "another task, and with a random head it would teach noise. Give one that was trained for semantic segmentation."
        )
    labels = [str(label) for _, label in sorted(model.config.id2label.items())]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    metadata = _plain_metadata(f"hf:{name}")
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)  # type: ignore[no-untyped-call]
        metadata = metadata.replace(**_normalisation(processor, f"hf:{name}"))
    except (OSError, ValueError, AttributeError, ImportError):
        say(f"hf:{name} does not say how its images are normalised; ImageNet's statistics are taken.")
    return _Found(LogitsOf(model), None if generic else labels, metadata)


def _normalisation(processor: Any, name: str) -> dict[str, tuple[float, float, float]]:
    """Return the mean and the standard deviation with which a processor of transformers normalises images.

    Raises:
        InputError: it does something else with the pixels than (x / 255 - mean) / std in the order red, green, blue.
    """
    flips, rescales = getattr(processor, "do_flip_channel_order", False), getattr(processor, "do_rescale", True)
    factor = getattr(processor, "rescale_factor", 1 / 255)
    if flips or not rescales or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        found = "blue, green, red" if flips else f"pixels times {factor}" if rescales else "pixels from 0 to 255"
        raise InputError(
            f"{name} takes {found} (its preprocessor_config.json says so), and a teacher is given red, green, blue from 0 to 1: "
            "it would teach what it makes of wrong colours. Wrap it in your own function that turns the one into the other: "
            "--teacher package.module:function."
        )
    if not processor.do_normalize:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return {"mean": _three(processor.image_mean), "std": _three(processor.image_std)}


def _from_torchvision(rest: str) -> _Found:
    from torchvision import models as tv

    name, _, weights_file = rest.partition(":")
    if name not in tv.list_models(module=tv.segmentation):
        raise InputError(
            f"torchvision has no segmentation network {name!r}; it has {', '.join(tv.list_models(module=tv.segmentation))}."
        )
    metadata = _plain_metadata(f"torchvision:{name}")
    voc = [c.name for c in VOC_CLASSES]
    if not weights_file:
        try:
            return _Found(LogitsOf(tv.get_model(name, weights="DEFAULT")), voc, metadata)
        except OSError as error:
            raise InputError(
                f"The weights of torchvision:{name} cannot be downloaded ({first_line(error)}). Download them elsewhere and give "
                f"torchvision:{name}:WEIGHTS.pth."
            ) from error
    path = existing_file(Path(weights_file).expanduser(), "The weights file")
    content = _content(path)
    if content is None:
        raise InputError(
            f"{path} cannot be loaded safely, or is damaged. Write it with torch.save(model.state_dict(), FILE)."
        )
    # torchvision's own training script saves the state dict among other things.
    nested = content.get("model", content) if isinstance(content, dict) else {}
    state = {str(key).removeprefix("module."): value for key, value in nested.items()}
    head = next((state[k] for k in ("classifier.4.weight", "classifier.low_classifier.weight") if k in state), None)
    if head is None:
        raise InputError(
            f"{path} does not hold the state dict of torchvision's {name}: no tensor is named classifier.… Write it with "
            "torch.save(model.state_dict(), FILE)."
        )
    try:
        count = head.shape[0]
        auxiliary = any(k.startswith("aux_classifier.") for k in state)
        options = {} if name.startswith("lraspp") else {"aux_loss": auxiliary}
        model = tv.get_model(name, weights=None, weights_backbone=None, num_classes=count, **options)
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} does not hold the state dict of torchvision's {name}: {first_line(error)}."
        ) from error
    return _Found(LogitsOf(model), voc if count == len(voc) else None, metadata, sha256(path))


def _from_smp(folder: str) -> _Found:
    try:
        import segmentation_models_pytorch as smp
        import timm
    except ImportError as error:
        raise MissingDependencyError(
            f"smp:{folder} needs segmentation_models_pytorch. Install it with: pip install 'aicsd-deploy[models]'"
        ) from error
    if not Path(folder).expanduser().is_dir():
        raise InputError(
            f"smp:{folder}: a teacher of segmentation_models_pytorch is a folder that model.save_pretrained(FOLDER) wrote, and "
            f"{folder} is none. A network without trained weights teaches nothing."
        )
    try:
        # Without the activation that it may end in: logits are compared here.
        model: Any = smp.from_pretrained(str(Path(folder).expanduser()), activation=None)
    except Exception as error:  # whatever the file or the library raises
        raise InputError(f"smp:{folder} cannot be loaded ({type(error).__name__}: {first_line(error)}).") from error
    metadata, encoder = _plain_metadata(f"smp:{folder}"), str(model.config["encoder_name"])
    if encoder.startswith("tu-") and timm.models.is_model_pretrained(encoder[3:]):
        known = smp.encoders.get_preprocessing_params(encoder)  # timm has them without a download
        metadata = metadata.replace(mean=_three(known["mean"]), std=_three(known["std"]))
    else:
        say(f"smp:{folder} does not say how its images are normalised; ImageNet's statistics are taken.")
    return _Found(LogitsOf(model), None, metadata)


@torch.no_grad()
def _count_classes(network: nn.Module, name: str, size_hw: tuple[int, int]) -> int:
    try:
        output: Tensor = network.eval()(torch.zeros(1, 3, *size_hw))
    except Exception as error:  # whatever the user's own code raises
        raise InputError(
            f"The teacher {name} cannot take an image of {size_hw[0]}x{size_hw[1]}: {first_line(error)}. If it "
            "takes one size only, give that with --image-size."
        ) from error
    if output.min() >= 0 and torch.allclose(output.sum(dim=1), torch.ones(())):
        raise InputError(
            f"The teacher {name} gives probabilities, but logits are compared here, and softmax of probabilities is nearly the "
            "same for all classes. Leave out its softmax."
        )
    return output.shape[1]


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return (red, green, blue)
