"""The settings of a training run: one pydantic model that is the YAML file, the flags and what a checkpoint records."""

from __future__ import annotations

import argparse
import types
import typing
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from aicsd_deploy.cli import Parser, device_name, size_hw
from aicsd_deploy.data.spec import SPEC_HELP
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import existing_file
from aicsd_deploy.runtime.frames import scaled

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from typing_extensions import Self


def _read_size(value: Any) -> Any:
    """Take what the flag takes, and [height, width] from a file."""
    if isinstance(value, list | tuple):
        value = "x".join(map(str, value))
    try:
        return size_hw(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def _switched(name: str, value: Any) -> Any:
    """Take `on` and `off` from a file, which YAML reads as true and false."""
    return (ON_ALONE[name] if value else "off") if isinstance(value, bool) else value


SizeHW = Annotated[tuple[int, int] | None, BeforeValidator(lambda value: None if value is None else _read_size(value))]
Method = Literal["none", "kd", "at", "sp", "ickd", "cwd", "dist", "icsd", "aicsd"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
C = TypeVar("C", bound="TrainConfig")
MAIN = ("data", "model", "teacher", "method", "image_size", "epochs")
"""What nearly every training is given: it stands first in --help, before the fifty settings that few need."""
ON_ALONE = {"alw": "linear", "qat": "cpu"}
"""What a flag of several values means where it stands alone."""
OF_LOGITS = ("temperature", "distill_size", "mask_ignored", "teacher_errors", "teacher_confidence")
"""Settings that say how logits are compared; methods that compare features have no use for them."""
OF_A_TEACHER = ("teacher", "class_map", "teacher_scale")
"""Settings about the teacher, which method "none" has no use for."""


class TrainConfig(BaseModel):
    """What both teacher and student training take; the descriptions are the flags' help."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    data: str = Field("synthetic", description=f"data set: {SPEC_HELP}")
    model: str = Field(
        "lraspp_resnet18",
        description="network: lraspp_resnet18, deeplabv3plus_resnet101, … (README lists them), or smp:ARCHITECTURE:ENCODER, or package.module:function",
    )
    backbone_weights: Path | None = Field(
        None, description="local file with the backbone's ImageNet weights (torchvision's state dict)"
    )
    init: Path | None = Field(
        None,
        description="checkpoint of the same network to start from (default: random weights, or --backbone-weights)",
    )
    image_size: SizeHW = Field(
        None, description="size the network works on, HEIGHTxWIDTH (default: that of the first validation image)"
    )
    epochs: int = Field(6, ge=1, description="passes over the training images")
    batch_size: int = Field(
        8, ge=2, description="images per step, over all processes; batch normalisation needs 2 at a time"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd has momentum 0.9, as in the paper")
    lr: float = Field(1e-3, gt=0, description="peak learning rate; falls to 0 as (1 - progress) to the power 0.9")
    backbone_lr_factor: float | None = Field(
        None,
        ge=0,
        description="learning rate of the backbone relative to --lr (default: 0.1 with --backbone-weights, else 1)",
    )
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    warmup_steps: int = Field(
        50, ge=0, description="steps over which the learning rate rises from 0; at most a fifth of all steps"
    )
    clip_norm: float = Field(5.0, gt=0, description="the gradient's norm is cut to this")
    scale: tuple[float, float] = Field(
        (0.75, 1.5), description="range of the random scale: two factors; 0.5 2.0 is the papers' usual"
    )
    crop_size: SizeHW = Field(None, description="crop that training sees, HEIGHTxWIDTH (default: --image-size)")
    keep_aspect: bool = Field(
        False, description="keep the proportions of training pictures instead of stretching them to --image-size"
    )
    color_jitter: float = Field(0.3, ge=0, le=0.9, description="strength of random brightness, contrast and saturation")
    flip: bool = Field(True, description="mirror half of the images")
    val_every: int = Field(5, ge=1, description="epochs between two validations (the last epoch always has one)")
    save_every: int = Field(100, ge=1, description="steps between two saves of last.pt (every validation saves too)")
    log_every: int = Field(20, ge=1, description="steps between two lines of the log")
    keep: int = Field(2, ge=1, description="newest states kept, in case last.pt is damaged; best.pt besides")
    seed: int = Field(0, ge=0, description="seed of the weights, the order and the augmentation")
    workers: int = Field(0, ge=0, description="processes that prepare images; 0 does it in the training process")
    cache: float = Field(
        2.0, ge=0, description="GiB of memory for decoded images, so that each is read once; 0 for none"
    )
    precision: Precision = Field(
        "auto",
        description="what the networks compute in, losses and weights always float32; auto: bf16 or fp16 on GPUs, fp32 on the CPU",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="parts that a step's batch is computed in, where it does not fit at once; sp and dist compare the images of "
        "one part only, so that parts (and processes) change their term",
    )
    compile: bool = Field(False, description="compile the networks with torch.compile: minutes to start, faster steps")
    checkpoint_activations: bool = Field(
        False,
        description="compute blocks twice instead of keeping their activations: less memory, slower",
    )
    sync_bn: bool = Field(False, description="batch normalisation over the batches of all processes (GPUs)")
    ema: float | None = Field(
        None, gt=0, lt=1, description="score and keep an exponential moving average of the weights, for example 0.999"
    )
    on_broken_step: Literal["stop", "skip"] = Field(
        "stop", description="what to do when the loss is no number or explodes; the weights are safe either way"
    )
    profile: bool = Field(False, description="record a few steps into profile.json, for chrome://tracing or Perfetto")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads for the network (default: all cores); 1 makes CPU runs repeatable to the bit",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 8:
            raise ValueError(f"scale {low} {high}: give two factors, the smaller first, above 0 and up to 8")
        try:
            device_name(self.device)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"device: {error}") from None
        return self


class MethodConfig(BaseModel):
    """What a student learns from its teacher, and how the terms are weighted; see `Distiller`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Method = Field(
        "aicsd",
        description="none: labels only; kd: pixel-wise distillation; icsd: inter-class similarity distillation; aicsd: both, "
        "weighted by ALW; to compare with: at (attention transfer), sp (similarity-preserving), ickd (inter-channel "
        "correlation), which compare features of all pixels, cwd (channel-wise), dist (correlation)",
    )
    lambda_icsd: float = Field(
        10.0,
        ge=0,
        description="weight of the ICSD term; 100 gives it about the gradient of cross-entropy, which hurt in our small studies",
    )
    lambda_kd: float = Field(
        1.0,
        ge=0,
        description="weight of the pixel-wise term; 5 was better for kd with one student on CamVid and worse with another",
    )
    lambda_rival: float | None = Field(
        None,
        ge=0,
        description="weight of the term of at, sp, ickd, cwd or dist (default: each one's own; README lists them)",
    )
    balance: float | None = Field(
        None,
        gt=0,
        description="instead of the lambdas: weigh each term of the teacher so that its gradient is this many times that of "
        "cross-entropy, measured over the first 20 steps; use it where you have no lambda for your data yet",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="temperature of the teacher's terms (default: 4 for cwd, else 1); higher looks at weaker classes",
    )
    icsd_normalize: Literal["row", "none"] = Field(
        "row",
        description="row: rows of the similarity matrix are scaled to length 1, so that lambda carries over between sizes; "
        "none: raw, when classes that differ most should count most",
    )
    icsd_direction: Literal["full", "symmetric"] = Field(
        "full",
        description="full: every KL(i, j), as in the paper; symmetric: the mean of both directions, when a class that is "
        "nearly absent makes one direction huge",
    )
    icsd_classes: Literal["all", "present"] = Field(
        "all",
        description="all: every class in every image; present: only those that the teacher or the label has in the image, "
        "when there are many classes and few per image",
    )
    icsd_warmup: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of training over which the ICSD term rises to its weight; use it when a student from random "
        "weights learns slower with ICSD at first",
    )
    distill_size: Literal["logits", "full"] = Field(
        "logits",
        description="logits: the teacher's terms at the size of the student's own logits, cheap; full: at the size of the "
        "labels, when thin things matter and memory allows it",
    )
    mask_ignored: bool = Field(
        True,
        description="leave ignored and padded pixels out of the teacher's terms; keep them where much is unlabelled and the "
        "teacher knows better",
    )
    teacher_scale: float = Field(
        1.0,
        ge=1,
        le=16,
        description="the teacher sees each picture this many times as high and wide as the student, best a whole number: for a "
        "teacher that was trained on larger pictures than the student is to run on",
    )
    teacher_errors: Literal["keep", "mask", "weigh"] = Field(
        "keep",
        description="mask: leave out where the teacher contradicts the label, when it is weak; weigh (kd, aicsd): in the "
        "pixel-wise term each pixel counts by the probability that the teacher gives to its label, which keeps more of it",
    )
    teacher_confidence: float = Field(
        0.0, ge=0, lt=1, description="leave out where the teacher's highest probability is below this; 0 keeps all"
    )
    alw: Annotated[
        Literal["auto", "off", "linear", "cosine", "quadratic"],
        BeforeValidator(lambda value: _switched("alw", value)),
    ] = Field(
        "auto",
        description="adaptive loss weighting, for any method: how its weight alpha moves over training. auto: linear for "
        "aicsd, off for others; cosine: slow at both ends; quadratic: the teacher stays longer, when training is short",
    )
    alw_start: float = Field(
        0.0, ge=0, le=1, description="alpha of the first step; above 0 lets the labels count from the start"
    )
    alw_end: float = Field(1.0, ge=0, le=1, description="alpha of the last step; below 1 keeps the teacher to the end")
    alw_per: Literal["step", "epoch"] = Field(
        "step", description="step: alpha moves evenly; epoch: it stands still within an epoch, as in the paper"
    )
    alw_routing: Literal["paper", "all-fade", "kd-fades"] = Field(
        "paper",
        description="paper: cross-entropy and ICSD get alpha, other terms 1 - alpha (ICSD too where it is the only one); "
        "all-fade: every term of the teacher fades, when ICSD hurts late; kd-fades: cross-entropy and ICSD keep their full "
        "weight, when the labels should count from the start",
    )
    student_layer: str | None = Field(
        None, description="for at, sp, ickd: the student's layer whose features are compared (default: its backbone)"
    )
    teacher_layer: str | None = Field(None, description="the same of the teacher")

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        unused = [n for n in OF_LOGITS if getattr(self, n) != MethodConfig.model_fields[n].default]
        if self.method in ("at", "sp", "ickd") and unused:
            raise ValueError(
                f"{self.method} compares whole maps of features, so {', '.join(unused)} would change nothing: leave it out, or "
                "use a method that compares logits, such as kd or aicsd"
            )
        if self.teacher_errors == "weigh" and self.method not in ("none", "kd", "aicsd"):
            raise ValueError(
                f"teacher_errors weigh needs a pixel-wise term, and {self.method} has none: use kd or aicsd"
            )
        return self


class DistillConfig(MethodConfig, TrainConfig):
    """What distillation takes besides."""

    teacher: str | None = Field(
        None,
        description="the teacher (default: the newest under runs/ for this data; trained first if there is none): a checkpoint, "
        "hf:NAME or hf:FOLDER (transformers), torchvision:NAME[:WEIGHTS.pth], smp:FOLDER, package.module:function",
    )
    class_map: Path | None = Field(
        None,
        description="YAML file with lines `student class: teacher class` (or a list of them), for a teacher of other classes; "
        "classes that it does not name are left out of the teacher's terms (not by at, sp, ickd)",
    )
    image_size: SizeHW = Field(
        None,
        description="size the network works on, HEIGHTxWIDTH (default: the teacher's, by --teacher-scale smaller, else that of the first validation image)",
    )
    qat: Annotated[
        Literal["off", "cpu", "tensorrt"],
        BeforeValidator(lambda value: _switched("qat", value)),
    ] = Field(
        "off",
        description="go on distilling a trained student (--init; default: the newest under runs/) while its convolutions "
        "and linear layers compute as in INT8, so that export/to_int8.py loses less; the value is its --target (tensorrt also for "
        "openvino and both), cpu where none is given",
    )
    model: str = Field(
        "lraspp_mobilenetv2",
        description="the student network: lraspp_mobilenetv2, deeplabv3plus_resnet18, … (README lists them), or smp:ARCHITECTURE:ENCODER, or package.module:function",
    )

    @property
    def teacher_size(self) -> tuple[int, int] | None:
        """Size of the pictures that the teacher is shown, where the settings say it."""
        return None if self.image_size is None else scaled(self.image_size, self.teacher_scale)

    @model_validator(mode="after")
    def _check_qat(self) -> Self:
        if self.qat != "off" and (self.sync_bn or self.checkpoint_activations):
            raise ValueError(
                "qat keeps the statistics of batch normalisation and computes each block once: it takes neither sync_bn nor "
                "checkpoint_activations"
            )
        return self


def add_config_flags(
    parser: Parser,
    config: type[TrainConfig],
    *,
    renamed: dict[str, str] | None = None,
    without: Collection[str] = (),
) -> None:
    """Add one flag per setting of `config`, besides `--config FILE`; `renamed` gives settings another flag name as well.

    Settings in `without` get no flag.
    """
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with any of the settings below; flags override it"
    )
    for name, field in sorted(config.model_fields.items(), key=lambda item: item[0] not in MAIN):
        if name in without:
            continue
        flags = ["--" + flag.replace("_", "-") for flag in dict.fromkeys([(renamed or {}).get(name, name), name])]
        help_text = (field.description or "") + (
            "" if field.default is None else f" (default: {_shown(field.default)})"
        )
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
        kind = _plain_type(field.annotation)
        if kind is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is Literal:
            alone: dict[str, Any] = {"nargs": "?", "const": ON_ALONE[name]} if name in ON_ALONE else {}
            parser.add_argument(*flags, choices=typing.get_args(kind), **alone, **options)
        elif kind == tuple[int, int]:
            parser.add_argument(*flags, type=size_hw, metavar="HxW", **options)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(*flags, type=float, nargs=2, metavar=("LOW", "HIGH"), **options)
        else:
            metavar = {int: "N", float: "X", Path: "PATH"}.get(kind, "NAME")
            parser.add_argument(*flags, type=kind, metavar=metavar, **options)


def read_config(config: type[C], args: argparse.Namespace) -> C:
    """Return the settings: what flags say, else what the file of `--config` says, else the defaults.

    Raises:
        InputError: the file is no YAML mapping, names a setting that there is not, or a value is out of range.
    """
    values: dict[str, Any] = {}
    if args.config is not None:
        loaded = read_mapping(args.config, "The file of --config", holds="settings as `name: value` lines")
        for key, value in loaded.items():
            name = str(key).replace("-", "_")
            if name in values:
                raise InputError(
                    f"{args.config} has {name!r} twice, spelt with - and with _. Leave one of the two lines."
                )
            values[name] = value
    values |= {name: getattr(args, name) for name in config.model_fields if hasattr(args, name)}
    return validated(config, values)


def read_mapping(path: Path, what: str, *, holds: str) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds; `what` and `holds` name the file and its content in messages.

    Raises:
        InputError: there is no such file, it is no YAML mapping, or it has a line twice, of which YAML takes the last.
    """
    try:
        text = existing_file(path, what).read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(tree, yaml.MappingNode):
        raise InputError(f"{path} must hold {holds}.")
    twice = [name for name, count in Counter(key.value for key, _ in tree.value).items() if count > 1]
    if twice:
        raise InputError(f"{path} has {twice[0]!r} twice, and only one can hold. Leave one of the two lines.")
    return content


def validated(config: type[C], values: dict[str, Any]) -> C:
    """Return a config, or raise InputError that names each wrong setting."""
    try:
        return config(**values)
    except ValidationError as error:
        lines = [_said_plainly(e, config) for e in error.errors()[:8]]
        known = f"\nSettings there are: {', '.join(config.model_fields)}." if "extra_forbidden" in str(error) else ""
        raise InputError("The settings cannot be used:\n" + "\n".join(lines) + known) from error


def _said_plainly(error: ErrorDetails, config: type[TrainConfig]) -> str:
    """Return a line about one wrong setting: which, what it must be, and what it is for."""
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    text = text.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    text = {"too_short": "must name at least one", "extra_forbidden": "is no setting"}.get(error["type"], text)
    if not error["loc"]:  # several settings together: the text names them
        return f"  {text}"
    field = config.model_fields.get(str(error["loc"][0]))
    purpose = "" if field is None else f". It is: {field.description}"
    return f"  {'.'.join(map(str, error['loc']))}: {text} (given: {error['input']!r}){purpose}"


def _plain_type(annotation: Any) -> Any:
    """Return X for `X | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
