"""Where a training starts from when not from random weights: the checkpoint of --init, and what it settles."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.config import DistillConfig, TrainConfig
from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.runs import newest_checkpoint
from aicsd_deploy.training.last import LastCheckpoints

C = TypeVar("C", bound=TrainConfig)
QAT_LR = 1e-4
"""Peak learning rate of quantisation-aware training where none is given: the network is trained already."""


def settled(config: C, out: Path) -> C:
    """Return the settings with what the checkpoint to start from settles: network, size; for --qat the checkpoint itself.

    Raises:
        InputError: --qat without a trained student, or the checkpoint is of another network than the one asked for.
    """
    quantised = isinstance(config, DistillConfig) and config.qat != "off"
    path = _trained_student(config, out) if quantised and config.init is None else config.init
    if path is None:
        return config
    checkpoint = load_checkpoint(path)
    metadata, given = checkpoint.metadata, config.model_fields_set
    if "model" not in given:
        checkpoint.build()  # refuses code of the user's own that only the file names
    elif config.model != metadata.model:
        raise InputError(
            f"{path} holds a {metadata.model}, not a {config.model}: a network starts from its own weights only."
        )
    changes = {"init": path, "model": metadata.model, "image_size": config.image_size or metadata.image_size_hw}
    if quantised and "lr" not in given:
        changes["lr"] = QAT_LR
    return config.model_copy(update=changes)


def start_from(path: Path, network: nn.Module, classes: tuple[SegClass, ...]) -> Metadata:
    """Load a checkpoint's weights into a network and return what the checkpoint says about itself.

    Raises:
        InputError: it tells other classes apart, or its weights do not fit.
    """
    checkpoint = load_checkpoint(path)
    theirs, ours = checkpoint.metadata.class_names, [c.name for c in classes]
    if theirs != ours:
        raise InputError(
            f"{path} knows the classes {', '.join(theirs)}; this data has {', '.join(ours)}. Give another --init, or none."
        )
    checkpoint.load_into(network)
    say(f"starting from {path}")
    return checkpoint.metadata


def _trained_student(config: TrainConfig, out: Path) -> Path:
    """Return the student that a run began with; of a new run, the newest for its data."""
    state = LastCheckpoints(out, keep=1).load()
    if state is not None and "init" in state.metadata.provenance:
        return Path(state.metadata.provenance["init"])
    newest = newest_checkpoint(role="student", data=config.data)
    if newest is None:
        raise InputError(
            f"--qat goes on with a trained student, and there is none for {config.data} under runs/. Name one with --init, or "
            "train one first: python train/distill.py"
        )
    return newest
