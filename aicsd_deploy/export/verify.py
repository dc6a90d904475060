"""The gate: what was exported must label real frames as the checkpoint does, or it is not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aicsd_deploy.console import say
from aicsd_deploy.data.dataset import SegmentationDataset, evenly_spread
from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import as_input

MIN_AGREEMENT = 0.995
"""Share of pixels that an ONNX file must label as its checkpoint does, at every size."""
BATCH = 4
"""How many frames are compared at once where the candidate takes any batch: enough to prove it, and not all, for memory's sake."""
MOSTLY = 0.99
"""A class with more of the pixels than this leaves too few others to compare."""


@dataclass(frozen=True)
class Agreement:
    """How far two backends agree.

    Attributes:
        share: part of all pixels that both label alike, 0 to 1.
        by_size: the same for every frame size that was tried, HxW.
        by_class: for every class, the part of the reference's pixels that the other labels alike; None where it has none.
        largest_class: the class that most of the reference's pixels have, and the part of them that do.
        frames: how many frames were compared, counted once a size.
    """

    share: float
    by_size: dict[str, float]
    by_class: dict[str, float | None]
    largest_class: tuple[str, float]
    frames: int

    @property
    def worst_size(self) -> tuple[str, float]:
        """The size at which they agree least, and the share of pixels there."""
        return min(self.by_size.items(), key=lambda item: item[1])

    def say_if_it_proves_little(self) -> None:
        """Warn where nearly all pixels are of one class."""
        name, share = self.largest_class
        if share > MOSTLY:
            say(
                f"warning: the network labels {100 * share:.1f} % of these pixels {name!r}, so that agreement proves little. If "
                "there is more to see in the frames, it is not trained enough."
            )


def frames_for_comparison(dataset: SegmentationDataset, *, count: int) -> list[UInt8Array]:
    """Return real frames, uint8 (H, W, 3) in blue, green, red, evenly spread over a data set."""
    return [dataset.load_bgr(i)[0] for i in evenly_spread(len(dataset), count)]


def compare(
    reference: Backend,
    candidate: Backend,
    frames_bgr: Sequence[UInt8Array],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Agreement:
    """Label frames with both backends and count the pixels on which they agree.

    Where the candidate takes any size, `sizes` are tried; by default three: its own, half and one and a half times that, in
    steps of 32.
    Where it takes any batch, the frames go through it in batches.

    Raises:
        VerificationError: one of the two does not run at one of the sizes.
    """
    classes = reference.metadata.class_names
    alike, total = np.zeros(len(classes), np.int64), np.zeros(len(classes), np.int64)
    by_size: dict[str, float] = {}
    for size in sizes or sizes_to_try(candidate):
        at_size = candidate.metadata.replace(image_size_hw=size)
        frames = np.concatenate([as_input(frame, at_size) for frame in frames_bgr])
        step = BATCH if "batch" in candidate.metadata.dynamic else 1
        try:
            expected = np.concatenate([reference.infer(frame[None]) for frame in frames])
            found = np.concatenate([candidate.infer(frames[i : i + step]) for i in range(0, len(frames), step)])
        except InputError as error:
            raise VerificationError(
                f"It does not run at every size it was made for: {str(error).rstrip('.')}. It was not kept. Export without --dynamic size, "
                "or give export/to_trt.py a --profile of sizes that the network takes."
            ) from error
        same = expected == found
        by_size[f"{size[0]}x{size[1]}"] = float(same.mean())
        total += np.bincount(expected.ravel(), minlength=len(classes))
        alike += np.bincount(expected[same].ravel(), minlength=len(classes))
    by_class = {n: float(a / t) if t else None for n, a, t in zip(classes, alike, total, strict=True)}
    largest = (classes[int(total.argmax())], float(total.max() / total.sum()))
    return Agreement(float(alike.sum() / total.sum()), by_size, by_class, largest, len(frames_bgr))


def require_agreement(agreement: Agreement, *, what: str) -> None:
    """Raise VerificationError where any size agrees on fewer pixels than `MIN_AGREEMENT`, naming the worst classes."""
    agreement.say_if_it_proves_little()
    worst_size, worst = agreement.worst_size
    if worst >= MIN_AGREEMENT:
        return
    known = {name: share for name, share in agreement.by_class.items() if share is not None}
    classes = ", ".join(
        f"{name} {100 * share:.1f} %" for name, share in sorted(known.items(), key=lambda item: item[1])[:3]
    )
    raise VerificationError(
        f"{what} does not do what the checkpoint does: at {worst_size} they agree on {100 * worst:.2f} % of the pixels, at "
        f"least {100 * MIN_AGREEMENT:.2f} % are required (worst classes: {classes}). It was not kept. "
        f"{'Export without --dynamic size, or report' if len(agreement.by_size) > 1 else 'Report'} the network."
    )


def sizes_to_try(candidate: Backend) -> list[tuple[int, int]]:
    """Return the frame sizes (height, width) at which an artefact is to be compared."""
    own = candidate.metadata.image_size_hw
    if "size" not in candidate.metadata.dynamic:
        return [own]
    scaled = [(max(64, 32 * round(own[0] * f / 32)), max(64, 32 * round(own[1] * f / 32))) for f in (0.5, 1.5)]
    return [own, *(size for size in scaled if size != own)]
