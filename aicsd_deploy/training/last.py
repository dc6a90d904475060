"""The newest states of a run: last.pt, and some before it as step-NNNNNNNN.pt in case last.pt is damaged."""

from __future__ import annotations

import os
from pathlib import Path

from aicsd_deploy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError

LAST, BEST = "last.pt", "best.pt"
REQUIRED = {"step", "optimizer", "config", "identity"}


class LastCheckpoints:
    """Keeps the newest `keep` states in a run folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._step: int | None = None  # of a last.pt that is known to be whole

    def load(self) -> Checkpoint | None:
        """Return the newest state that is whole; None where the run has not saved any yet.

        Raises:
            InputError: there are states, and all of them are damaged or of something else than a training; or there is none
                beside a best.pt, which a run that starts anew would overwrite.
        """
        last = self.folder / LAST
        for path in [*([last] if last.exists() else []), *reversed(self._older())]:
            try:
                checkpoint = load_checkpoint(path)
            except InputError as error:
                say(f"warning: {error}\nTrying the state before it.")
                continue
            if not checkpoint.training.keys() >= REQUIRED:
                raise InputError(f"{path} holds no training to go on with. Give another --out.")
            if path == last:
                self._step = int(checkpoint.training["step"])
            return checkpoint
        if last.exists() or self._older():
            raise InputError(f"Every saved state in {self.folder} is damaged. Start again with another --out.")
        if (self.folder / BEST).exists():
            raise InputError(
                f"{self.folder} holds {BEST} but no state to go on from ({LAST} and those before it are gone), and a run that "
                f"starts anew would overwrite {BEST}. Give another --out; there, --init {self.folder / BEST} starts from its weights."
            )
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write last.pt; the one before is kept under the name of its step, the oldest are removed."""
        last, step = self.folder / LAST, int(checkpoint.training["step"])
        if self.keep > 1 and self._step is not None:
            _also_named(last, self._named(self._step))
        save_checkpoint(last, checkpoint)
        self._step = step
        for path in self._older():
            if path > self._named(step):  # of a damaged state that this run did not go on from
                path.unlink()
        for path in self._older()[: 1 - self.keep or None]:
            path.unlink()

    def clear_leftovers(self) -> None:
        """Remove what writes that were killed have left; only while no other process writes here."""
        for leftover in self.folder.glob(".*.tmp*"):
            leftover.unlink()

    def _named(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def _older(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def holds_a_run(folder: Path) -> bool:
    """Return whether there is anything in `folder` that a new run would overwrite."""
    return any((folder / name).exists() for name in (LAST, BEST)) or any(folder.glob("step-*.pt"))


def is_whole(path: Path) -> bool:
    """Return whether there is a checkpoint that can be loaded."""
    try:
        load_checkpoint(path)
    except InputError:
        return False
    return True


def _also_named(path: Path, name: Path) -> None:
    """Give a file a second name; on a file system without hard links, which has only one, that one."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        path.replace(name)
