"""What the training commands do: data checked, networks built, trained, scored and summed up in one run folder."""

from __future__ import annotations

import hashlib
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.config import OF_A_TEACHER, DistillConfig, TrainConfig
from aicsd_deploy.console import percent, say, table
from aicsd_deploy.data.check import check_dataset, check_splits
from aicsd_deploy.data.dataset import CachedDataset, SegmentationDataset
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.data.transforms import derived_seed
from aicsd_deploy.distiller import Distiller
from aicsd_deploy.errors import InputError, first_line
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.files import check_writable, sha256, write_json
from aicsd_deploy.metadata import Metadata, provenance
from aicsd_deploy.models import build_model
from aicsd_deploy.models.deploy import Normalize
from aicsd_deploy.runs import newest_checkpoint
from aicsd_deploy.runtime.frames import scaled
from aicsd_deploy.runtime.torch_backend import TorchBackend, choose_device
from aicsd_deploy.teachers import Teacher, open_teacher
from aicsd_deploy.tracking import draw_overlays, plot_confusion, plot_curves
from aicsd_deploy.trainer import Trainer
from aicsd_deploy.training import distributed
from aicsd_deploy.training.fake_quant import imitate_int8
from aicsd_deploy.training.last import BEST, LastCheckpoints, holds_a_run
from aicsd_deploy.training.precision import autocast_dtype, lowered
from aicsd_deploy.training.resume import KNOWN_BY
from aicsd_deploy.training.start import settled, start_from
from aicsd_deploy.training.stopping import StopRequest
from aicsd_deploy.training.validation import evaluate_together


def train_teacher(config: TrainConfig, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a network on labels alone and return its summary; see `_train` for what lies in `out`."""
    return _train(settled(config, out), out, teacher=None, resume=resume)


def distill(config: DistillConfig, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Distil a student and return its summary; see `_train`.

    Without `config.teacher`, the newest teacher under runs/ for this data is taken, and one is trained if there is none.
    """
    for setting in OF_A_TEACHER:
        if config.method == "none" and getattr(config, setting) != DistillConfig.model_fields[setting].default:
            flag = "--" + setting.replace("_", "-")
            raise InputError(f"--method none learns from labels alone and takes no {flag}. Leave one of them out.")
    distributed.start(choose_device(config.device))
    out = distributed.from_main(out)
    asked, config = config, distributed.from_main(settled(config, out))
    if config.method == "none":
        return _train(config, out, teacher=None, resume=resume)
    own = out / "teacher"
    name, from_artifact = distributed.from_main(
        (config.teacher, False) if config.teacher else _teacher_of(out, own, config.data)
    )
    if name is None:
        if config.class_map is not None:
            raise InputError(
                "--class-map is for a teacher of other classes, and none is given. Name it with --teacher."
            )
        name = str(own / BEST)
        say(f"There is no teacher for {config.data} yet; training one first into {own}.")
        asked = asked.model_copy(update={"image_size": config.image_size})
        train_teacher(TrainConfig(**settings_for_teacher(asked)), own, resume=True)
    classes = listed(config.data, "val").classes
    teacher = open_teacher(
        name, classes, class_map=config.class_map, from_artifact=from_artifact, size_hw=config.teacher_size
    )
    say(f"teacher: {name} ({teacher.metadata.model})")
    compared = classes if teacher.known_classes is None else teacher.known_classes
    if len(compared) == 2 and config.method in ("icsd", "aicsd") and config.icsd_normalize == "row":
        say(
            "warning: with two classes a row of the similarity matrix has one number, which length 1 makes 1 in student and "
            "teacher alike, so that the ICSD term is 0. Give --icsd-normalize none, and --balance 0.1 for its weight."
        )
    if len(compared) == 2 and config.method == "dist":
        say(
            "warning: with two classes the correlation of a pixel's two probabilities is 1 or -1, from which nothing is learnt; "
            "what is left of dist is the correlation of each class over the pixels. --method cwd or kd use all."
        )
    return _train(config, out, teacher=teacher, resume=resume)


def settings_for_teacher(config: DistillConfig) -> dict[str, Any]:
    """Return what a teacher that is trained on the way takes over: all but what goes with the student's network.

    Its sizes are those of the pictures that it will be shown.
    """
    of_the_student = {"model", "init", "backbone_weights", "backbone_lr_factor"}
    settings = config.model_dump(include=TrainConfig.model_fields.keys() - of_the_student)
    sizes = {name: settings[name] for name in ("image_size", "crop_size") if settings[name] is not None}
    return settings | {name: scaled(size_hw, config.teacher_scale) for name, size_hw in sizes.items()}


def _teacher_of(out: Path, own: Path, data: str) -> tuple[str | None, bool]:
    """Return the teacher that a run began with and True; of a new run, the newest for its data, or None where one is to be
    trained, and False."""
    state = LastCheckpoints(out, keep=1).load() if distributed.is_main() else None
    if state is not None:
        return state.metadata.provenance.get("teacher", str(own / BEST)), True
    if own.is_dir():  # of an earlier call that was killed: go on with it
        return None, False
    newest = newest_checkpoint(role="teacher", data=data)
    return None if newest is None else str(newest), False


listed = lru_cache(maxsize=2)(open_dataset)
"""The splits of a data set with their files listed, but not looked at: a long list is read, and what is odd in it said, once."""


@lru_cache(maxsize=1)  # the trainings of one process (teacher, student) share what is loaded
def open_checked(spec: str, cache_gib: float) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Open training and validation data, look at every file, and keep in memory what fits.

    Raises:
        InputError: files that cannot be used, or splits with other classes.
    """
    room_bytes, opened = int(cache_gib * 2**30), []
    for split in ("train", "val"):
        dataset = CachedDataset(listed(spec, split), limit_bytes=room_bytes)
        check_dataset(dataset)  # fills the cache; workers are forked later and share it
        room_bytes -= dataset.kept_bytes
        say(f"{spec} ({split}): {dataset.kept_images} of {len(dataset)} images kept in memory")
        opened.append(dataset)
    check_splits(opened[0], opened[1])
    return opened[0], opened[1]


def _train(config: TrainConfig, out: Path, *, teacher: Teacher | None, resume: bool) -> dict[str, Any]:
    """Train one network into `out`: best.pt, last.pt, metrics.jsonl, tensorboard/, curves.png, confusion.png, overlays.png
    and, when all is done, summary.json."""
    started = time.monotonic()
    device = distributed.start(choose_device(config.device))
    out = distributed.from_main(out)
    if not resume and holds_a_run(out):
        raise InputError(f"{out} already holds a run. Give --resume auto to go on with it, or another --out.")
    if distributed.is_main():
        check_writable(out / BEST)
    with StopRequest() as stop:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        say(f"device: {device}" + (f", threads: {torch.get_num_threads()}" if device.type == "cpu" else "") + processes)
        torch.manual_seed(derived_seed("weights", config.seed))
        # Before the data is looked at, which can take minutes: a name or a split that is wrong is told at once.
        classes = listed(config.data, "train").classes
        listed(config.data, "val")
        network = build_model(config.model, num_classes=len(classes), backbone_weights=config.backbone_weights)
        train_data, val_data = open_checked(config.data, config.cache)
        metadata = _describe(config, teacher, network, train_data, val_data)
        network.to(device)
        _try(network, metadata, config.crop_size, device)
        distiller, scored = _distiller(config, network, metadata, teacher, val_data, device)
        identity = _identity(config, metadata, train_data, val_data)
        Trainer(network, distiller, config, metadata, train_data, val_data, out, device, identity, stop).fit()
        summary = None
        if distributed.is_main():
            summary = _sum_up(config, out, val_data, device, started=started, teacher=scored)
    return distributed.from_main(summary) or {}


def _describe(
    config: TrainConfig,
    teacher: Teacher | None,
    network: nn.Module,
    train_data: SegmentationDataset,
    val_data: SegmentationDataset,
) -> Metadata:
    """Return what the checkpoints of a training say of themselves, once the network has the weights that it begins with."""
    metadata = Metadata(
        model=config.model,
        classes=train_data.classes,
        image_size_hw=_image_size(config, teacher, val_data),
        role="student" if isinstance(config, DistillConfig) else "teacher",
        method=config.method if isinstance(config, DistillConfig) else "none",
        data=config.data,
    )
    origin = provenance() | {"torch": torch.__version__}
    if config.init is not None:
        began = start_from(config.init, network, train_data.classes)
        metadata = metadata.replace(mean=began.mean, std=began.std)
        origin |= {"init": str(config.init), "init_sha256": sha256(config.init)}
    if teacher is not None:
        origin |= {"teacher": teacher.name, "teacher_sha256": teacher.digest}
    return metadata.replace(provenance=origin)


def _distiller(
    config: TrainConfig,
    network: nn.Module,
    metadata: Metadata,
    teacher: Teacher | None,
    val_data: SegmentationDataset,
    device: torch.device,
) -> tuple[Distiller, dict[str, Any] | None]:
    """Return what gives the loss of a step, and which teacher it learns from with what mIoU."""
    distilling = config if isinstance(config, DistillConfig) else None
    autocast = autocast_dtype(config.precision, device)
    teacher_network, scored = None, None
    if teacher is not None:
        assert distilling is not None
        teacher_network, miou = _ready_teacher(teacher, val_data, metadata, distilling, device)
        scored = {"path": teacher.name, "miou": miou}
        lowered(teacher_network, autocast)
        if config.compile:
            teacher_network.compile()
    distiller = Distiller(
        nn.Sequential(Normalize(metadata), network).to(device),
        teacher_network,
        distilling,
        epochs=config.epochs,
        image_size_hw=metadata.image_size_hw,
        known_classes=None if teacher is None else teacher.known_classes,
        autocast=autocast,
    )
    if distilling is not None and distilling.qat != "off":
        for name, low_high in imitate_int8(network, symmetric=distilling.qat == "tensorrt").items():
            distiller.state.register_buffer(name, low_high)
    return distiller, scored


def _identity(
    config: TrainConfig, metadata: Metadata, train_data: SegmentationDataset, val_data: SegmentationDataset
) -> dict[str, Any]:
    """Return what besides the settings must be the same for a run to go on."""
    class_map = config.class_map if isinstance(config, DistillConfig) else None
    return {
        "classes": metadata.class_names,
        "training images": len(train_data),
        KNOWN_BY["image_size"]: list(metadata.image_size_hw),
        "SHA-256 of the teacher": metadata.provenance.get("teacher_sha256"),
        KNOWN_BY["data"]: _fingerprint(train_data, val_data),
        KNOWN_BY["init"]: metadata.provenance.get("init_sha256"),
        KNOWN_BY["class_map"]: None if class_map is None else sha256(class_map),
    }


def _fingerprint(*datasets: SegmentationDataset) -> str:
    """Return what tells that data in another place is the same; of pictures, only labels are read alike by every library."""
    digest = hashlib.sha256()
    for dataset in datasets:
        labels_HW = dataset.load(0)[1]
        digest.update("\n".join(map(dataset.name, range(len(dataset)))).encode())
        digest.update(f"\n{labels_HW.shape}".encode() + labels_HW.tobytes())
    return digest.hexdigest()


def _try(network: nn.Module, metadata: Metadata, crop_size_hw: tuple[int, int] | None, device: torch.device) -> None:
    """Raise InputError unless the network takes images and crops of these sizes and gives logits of these classes."""
    expected = len(metadata.classes)
    for flag, size in (("--image-size", metadata.image_size_hw), ("--crop-size", crop_size_hw)):
        if size is None:
            continue
        try:
            with torch.no_grad():
                logits = network.eval()(torch.zeros(1, 3, *size, device=device))
        except Exception as error:  # whatever the user's own code raises
            raise InputError(
                f"{metadata.model} cannot take images of {size[0]}x{size[1]} (float32, 3 channels): {first_line(error)}. Choose "
                f"another {flag}, or change that in the network."
            ) from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4 or logits.shape[:2] != (1, expected):
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise InputError(f"{metadata.model} must give logits (1, {expected}, h, w) for one image, not {found}.")


def _ready_teacher(
    teacher: Teacher,
    val_data: SegmentationDataset,
    student: Metadata,
    config: DistillConfig,
    device: torch.device,
) -> tuple[nn.Module, float]:
    """Return the teacher, frozen and with its own normalisation, and its mIoU on pictures of the size that it is shown."""
    network = teacher.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size, own = scaled(student.image_size_hw, config.teacher_scale), teacher.metadata.image_size_hw
    metadata = teacher.metadata.replace(image_size_hw=size)
    _try(network, metadata, config.crop_size and scaled(config.crop_size, config.teacher_scale), device)
    if own[0] > 1.2 * size[0]:
        say(
            f"note: the teacher was trained on pictures of {own[0]}x{own[1]} and is shown {size[0]}x{size[1]}. "
            f"--teacher-scale {own[0] / student.image_size_hw[0]:.3g} shows it the size that it knows."
        )
    backend = TorchBackend(network, metadata, device=device)
    miou = evaluate_together(backend, val_data, title="scoring the teacher").scores(metadata.class_names).miou
    say(f"teacher's val mIoU: {percent(miou)} %")
    if miou < 1 / len(metadata.classes):
        say(
            "warning: that is no better than one class everywhere. Are its classes in the order of the data set's, and is it "
            "given the colours and the size that it was trained on?"
        )
    return nn.Sequential(Normalize(teacher.metadata), network).to(device).eval(), miou


def _image_size(config: TrainConfig, teacher: Teacher | None, data: SegmentationDataset) -> tuple[int, int]:
    if config.image_size is not None:
        return config.image_size
    if teacher is not None and min(teacher.metadata.image_size_hw) > 0:
        scale = config.teacher_scale if isinstance(config, DistillConfig) else 1.0
        return scaled(teacher.metadata.image_size_hw, 1 / scale)
    height, width, _ = data.load(0)[0].shape
    return height, width


def _sum_up(
    config: TrainConfig,
    out: Path,
    val_data: SegmentationDataset,
    device: torch.device,
    *,
    started: float,
    teacher: dict[str, Any] | None,
) -> dict[str, Any]:
    """Score best.pt once more from its file, draw the pictures, and write summary.json last of all."""
    checkpoint = load_checkpoint(out / BEST)
    network = checkpoint.build()
    backend = TorchBackend(network, checkpoint.metadata, device=device)
    matrix = evaluate(backend, val_data, title="scoring best.pt")
    scores = matrix.scores(checkpoint.metadata.class_names)
    plot_curves(out)
    plot_confusion(matrix.counts, val_data.classes, out / "confusion.png")
    draw_overlays({"predicted": backend}, val_data, out / "overlays.png")
    summary = {
        **scores.to_dict(),
        "split": val_data.split,
        "role": checkpoint.metadata.role,
        "method": checkpoint.metadata.method,
        "model": checkpoint.metadata.model,
        "data": checkpoint.metadata.data,
        "image_size_hw": list(checkpoint.metadata.image_size_hw),
        "parameters": sum(p.numel() for p in network.parameters()),
        "best_epoch": int(checkpoint.metadata.scores["epoch"]),
        "teacher": teacher,
        "seconds": round(time.monotonic() - started, 1),
        "config": config.model_dump(mode="json"),
        "provenance": checkpoint.metadata.provenance,
    }
    if isinstance(config, DistillConfig) and config.qat != "off":
        summary["imitated_int8_miou"] = checkpoint.metadata.scores["miou"]
    write_json(out / "summary.json", summary)
    say(
        table(
            ["class", "IoU, %"],
            [*([n, percent(v)] for n, v in scores.per_class_iou.items()), ["mean", percent(scores.miou)]],
        )
    )
    learned = f" ({checkpoint.metadata.method})" if checkpoint.metadata.role == "student" else ""
    say(f"{checkpoint.metadata.role} {checkpoint.metadata.model}{learned}: val mIoU {percent(scores.miou)} %")
    return summary
