"""Networks by name: ours, segmentation_models_pytorch's, and your own function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from torch import nn

from aicsd_deploy.errors import InputError, MissingDependencyError, first_line
from aicsd_deploy.metadata import TRUST_VARIABLE, is_trusted
from aicsd_deploy.models.backbones import Backbone, mobilenet_v2, resnet
from aicsd_deploy.models.deeplab import DeepLabV3Plus
from aicsd_deploy.models.lraspp import LRASPP

_BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet101": partial(resnet, 101),
    "resnet50": partial(resnet, 50),
    "resnet18": partial(resnet, 18),
    "mobilenetv2": mobilenet_v2,
}
_HEADS: dict[str, Callable[[Backbone, int], nn.Module]] = {"deeplabv3plus": DeepLabV3Plus, "lraspp": LRASPP}
MODEL_NAMES = tuple(f"{head}_{backbone}" for head in _HEADS for backbone in _BACKBONES)
_given_by_the_user: set[str] = set()
"""Names of code that the user gave to this very process: files may name it too."""


def build_model(
    name: str, *, num_classes: int, backbone_weights: Path | None = None, from_artifact: bool = False
) -> nn.Module:
    """Return a network that maps normalised images (B, 3, H, W) to logits (B, num_classes, h, w) at its own stride.

    Args:
        name: one of `MODEL_NAMES`; `smp:ARCHITECTURE:ENCODER` for segmentation_models_pytorch (`smp:DeepLabV3Plus:resnet34`);
            `package.module:function` for your own, called as `function(num_classes)`.
        num_classes: how many classes the network tells apart.
        backbone_weights: a local file with the state dict of torchvision's classification network; None starts at random.
        from_artifact: the name was read from a file and not given by the user: your own code is then run only if this
            process has built it before by the user's word, or the environment variable AICSD_TRUST names it.

    Raises:
        InputError: there is no such network, the weights are of another one, or an artefact names code that is not trusted.
        MissingDependencyError: segmentation_models_pytorch is asked for and not installed.
    """
    if name in MODEL_NAMES:
        head, backbone = name.split("_")
        return _HEADS[head](_BACKBONES[backbone](weights=backbone_weights), num_classes)
    if backbone_weights is not None:
        raise InputError(
            f"--backbone-weights serves {', '.join(MODEL_NAMES)}; load the weights of {name} in its own code."
        )
    if name.startswith("smp:"):
        return _from_smp(name, num_classes)
    if ":" in name:
        return load_callable(name, num_classes, from_artifact=from_artifact)
    raise InputError(
        f"There is no network {name!r}.{_meant(name, MODEL_NAMES)} There are {', '.join(MODEL_NAMES)}; "
        "smp:ARCHITECTURE:ENCODER; and your own as package.module:function."
    )


def backbone_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Return the parameters of the part that usually starts pretrained; none where the network names no such part."""
    part = getattr(model, "backbone", None) or getattr(model, "encoder", None)
    return part.parameters() if isinstance(part, nn.Module) else iter(())


def _from_smp(name: str, num_classes: int) -> nn.Module:
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} needs segmentation_models_pytorch. Install it with: pip install 'aicsd-deploy[models]'"
        ) from error
    if name.count(":") != 2:
        raise InputError(f"{name!r} is not smp:ARCHITECTURE:ENCODER. Write, for example, smp:DeepLabV3Plus:resnet34.")
    _, architecture, encoder = name.split(":")
    try:
        model: nn.Module = smp.create_model(architecture, encoder, encoder_weights=None, classes=num_classes)
    except (KeyError, ValueError, RuntimeError) as error:
        meant = _meant(architecture.lower(), smp.MODEL_ARCHITECTURES_MAPPING)
        meant = meant or _meant(encoder, smp.encoders.get_encoder_names())
        raise InputError(f"segmentation_models_pytorch has no {name!r}.{meant} It says: {error.args[0]}.") from error
    # Its heads end in (convolution, upsampling, activation); what we need are the logits before the upsampling.
    head = getattr(model, "segmentation_head", None)
    if (
        isinstance(head, nn.Sequential)
        and len(head) == 3
        and isinstance(head[1], nn.Upsample | nn.UpsamplingBilinear2d)
    ):
        head[1] = nn.Identity()
    return model


def _meant(name: str, known: Iterable[str]) -> str:
    nearest = [other for other in get_close_matches(name, list(known), 1, 0.8) if other != name]
    return "".join(f" Did you mean {other}?" for other in nearest)


def command_for(model: str, command: str) -> str:
    """Return a shell command, with the word that a checkpoint of your own network needs before it is opened."""
    own = ":" in model and not model.startswith("smp:")
    return f"{TRUST_VARIABLE}={model} {command}" if own else command


def load_callable(name: str, num_classes: int, *, from_artifact: bool = False) -> nn.Module:
    """Return what your own `package.module:function` makes of the number of classes; see `build_model`.

    Raises:
        InputError: it cannot be imported or called, makes no network, or an artefact names it and it is not trusted.
    """
    if from_artifact and name not in _given_by_the_user and not is_trusted(name):
        raise InputError(
            f"This checkpoint asks for your own code {name!r}. Nothing that a file names is run unless you say so. If you trust "
            f"it: export {TRUST_VARIABLE}={name}"
        )
    _given_by_the_user.add(name)
    module_name, function_name = name.split(":", 1)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        model = function(num_classes)
    except Exception as error:  # whatever the user's own code raises
        raise InputError(
            f"{name!r} cannot be imported and called with the number of classes ({type(error).__name__}: {first_line(error)}). "
            "It must be importable from the working folder."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}({num_classes}) returned {type(model).__name__}, not a torch.nn.Module.")
    return model
