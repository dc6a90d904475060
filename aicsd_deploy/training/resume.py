"""Whether a run is the one that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError

FREE_TO_CHANGE = {
    "workers", "threads", "device", "cache", "log_every", "save_every", "keep", "profile", "on_broken_step",
    "checkpoint_activations", "teacher",
}  # fmt: skip
"""Settings that a resumed run may have different; any other would make it another run."""
KNOWN_BY = {
    "image_size": "size of the images",
    "data": "SHA-256 of the data's names and first labels",
    "init": "SHA-256 of the weights at the start",
    "class_map": "SHA-256 of the class map",
}
"""Settings that may be given in another way, and what tells that they mean the same: a size that is the default, files in
another place, such as a job's own scratch folder."""


def changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """Return what has changed from `theirs` to `ours`, in words, by the name of the setting; what only one has is passed over."""
    return {
        name: f"{name}: was {theirs[name]!r}, now {value!r}"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    }


def check_same_run(
    ours: dict[str, Any], theirs: dict[str, Any], *, folder: Path, defaults: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Say which settings have changed since a run was saved.

    Args:
        ours, theirs: settings by name, now and then. What an older version has not saved cannot be compared.
        folder: where the run is.
        defaults: what a setting was before there was a choice, for runs that were saved by an older version.

    Raises:
        InputError: they make it another run.
    """
    theirs = dict(defaults) | theirs
    changed = changes(ours, theirs)
    free = FREE_TO_CHANGE | {name for name, content in KNOWN_BY.items() if content in ours and content in theirs}
    refused = [f"  {text}" for name, text in changed.items() if name not in free]
    if refused:
        raise InputError(
            f"{folder} holds a run with other settings:\n" + "\n".join(refused) + "\nGive the same, or another --out."
        )
    if changed:
        say("changed since this run was saved: " + "; ".join(changed.values()))
