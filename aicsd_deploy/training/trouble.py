"""What a run does about steps that broke and memory that ran out: name the cause, keep the evidence, say the way out."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from aicsd_deploy.config import TrainConfig
from aicsd_deploy.console import say
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.errors import AicsdError
from aicsd_deploy.files import atomic_path
from aicsd_deploy.tracking import RunLog
from aicsd_deploy.training import distributed
from aicsd_deploy.training.guard import BrokenStep
from aicsd_deploy.training.step import Loss

MOST_IN_A_ROW = 10
"""So many broken steps, one after the other, are not an accident."""


class BrokenSteps:
    """Stops the run at a broken step, or notes it and lets the run go on, as `--on-broken-step` says."""

    def __init__(self, config: TrainConfig, out: Path, batches: Callable[[int, int], Iterator[Batch]]) -> None:
        self._skips = config.on_broken_step == "skip"
        self._out = out
        self._batches = batches
        self._in_a_row, self._latest = 0, -2

    def report(self, found: list[BrokenStep], log: RunLog | None) -> set[int]:
        """Deal with the broken steps of the last stretch; return which they were.

        Raises:
            AicsdError: the run is to stop.
        """
        for broken in found:
            self._in_a_row = self._in_a_row + 1 if broken.step == self._latest + 1 else 1
            self._latest = broken.step
            first = broken.step - self._in_a_row + 1
            path = self._out / f"broken-step-{first:08d}.pt"
            if log is not None and self._in_a_row == 1:
                self._keep_batch(broken, path)
            if not self._skips or self._in_a_row >= MOST_IN_A_ROW:
                whose = (
                    "Its batch" if self._in_a_row == 1 else f"The batch of step {first}, the first of {self._in_a_row},"
                )
                raise AicsdError(
                    f"The loss broke at {broken}. {whose} is in {path}; the weights were left as they were before it. "
                    "Use a smaller --lr or smaller weights of the terms, or --on-broken-step skip to go on without such steps."
                )
            say(f"warning: skipped {broken}")
            if log is not None:
                log.write(broken.step + 1, skipped=broken.values)
        return {broken.step for broken in found}

    def _keep_batch(self, broken: BrokenStep, path: Path) -> None:
        """Make the batch once more (it depends on the seed and the step alone) and keep it for a look."""
        batch = next(self._batches(broken.step, broken.step + 1)).to(torch.device("cpu"))
        content = {"step": broken.step, "values": broken.values}
        with atomic_path(path) as temporary:
            torch.save(content | {"images_BCHW": batch.images_BCHW, "labels_BHW": batch.labels_BHW}, temporary)


@contextmanager
def memory_explained(loss: Loss, batch: Batch, config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory inside into a message with the batch size that fits.

    Raises:
        AicsdError: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:  # the base of torch.OutOfMemoryError; the CPU's allocator has no class of its own
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold on to what fills the memory
        raise AicsdError(_advice(loss, batch, config)) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def _advice(loss: Loss, batch: Batch, config: TrainConfig) -> str:
    at_once = batch.images_BCHW.shape[0] // config.accumulate
    fits = _largest_that_fits(loss, batch, at_once)
    text = (
        f"Out of memory with {at_once} images of {batch.images_BCHW.shape[2]}x{batch.images_BCHW.shape[3]} at a time. "
    )
    if fits == 0:
        return text + "Not even 2 fit: use a smaller --image-size, --checkpoint-activations, or a smaller network."
    parts = -(-batch.images_BCHW.shape[0] // fits)
    while batch.images_BCHW.shape[0] % parts:
        parts += 1
    less = fits * config.accumulate * distributed.world_size()
    return text + (
        f"{fits} fit: use --accumulate {parts}, which takes the step in parts, or --batch-size {less}; "
        "--checkpoint-activations and --precision bf16 save memory too."
    )


def _largest_that_fits(loss: Loss, batch: Batch, at_once: int) -> int:
    """Return the largest half, quarter, … of a batch whose pass forward and backward fits; 0 if not even 2 images do."""
    if distributed.world_size() > 1:
        return at_once // 2  # the other processes wait in a step of their own: nothing can be tried
    size = at_once // 2
    while size >= 2:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            part = Batch(batch.images_BCHW[:size], batch.labels_BHW[:size])
            loss(part, step=0, total_steps=1).total.backward()  # type: ignore[no-untyped-call]
            return size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        size //= 2
    return 0
