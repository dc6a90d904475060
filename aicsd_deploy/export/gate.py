"""The gate of low precision: how much an engine loses against the checkpoint, in agreement and in mIoU, and how much it may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aicsd_deploy.data.dataset import CachedDataset, SegmentationDataset, Subset, evenly_spread
from aicsd_deploy.errors import VerificationError
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.export.verify import Agreement, compare, frames_for_comparison
from aicsd_deploy.runtime.base import Backend


@dataclass(frozen=True)
class Limits:
    """What an artefact may lose.

    Attributes:
        agreement: smallest share of pixels labelled as the reference labels them, 0 to 1.
        miou_drop: largest fall of mIoU, as a fraction.
    """

    agreement: float
    miou_drop: float

    def replaced(self, agreement: float | None, miou_drop: float | None) -> Limits:
        """Return these limits with those that are given in their place."""
        return Limits(
            self.agreement if agreement is None else agreement, self.miou_drop if miou_drop is None else miou_drop
        )


LIMITS = {
    "fp32": Limits(agreement=0.999, miou_drop=0.001),
    "fp16": Limits(agreement=0.995, miou_drop=0.005),
    "bf16": Limits(agreement=0.98, miou_drop=0.01),
    "int8": Limits(agreement=0.95, miou_drop=0.01),
    "fp8": Limits(agreement=0.95, miou_drop=0.01),
}
"""By precision. bfloat16 keeps 8 bits of a number, float16 keeps 11; quantised formats move edges between classes."""


@dataclass(frozen=True)
class Drop:
    """What an artefact lost against its reference.

    Attributes:
        agreement: on which pixels both agree, at every size tried.
        reference_miou, candidate_miou: mIoU of both on the same images, over the classes that their labels have, 0 to 1.
        iou_drop: for every class, how far its IoU fell, 0 to 1; None for one that does not occur.
    """

    agreement: Agreement
    reference_miou: float
    candidate_miou: float
    iou_drop: dict[str, float | None]

    @property
    def miou_drop(self) -> float:
        """How far mIoU fell, as a fraction."""
        return self.reference_miou - self.candidate_miou

    def within(self, limits: Limits) -> bool:
        """Say whether no more was lost than is allowed."""
        return self.agreement.worst_size[1] >= limits.agreement and self.miou_drop <= limits.miou_drop

    def worst_classes(self) -> list[str]:
        """Name the three classes that lost most IoU."""
        known = {name: drop for name, drop in self.iou_drop.items() if drop is not None}
        return [f"{n} {-100 * d:+.1f}" for n, d in sorted(known.items(), key=lambda item: -item[1])[:3]]


def measure_drop(
    reference: Backend,
    candidate: Backend,
    dataset: SegmentationDataset,
    *,
    frames: int,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Drop:
    """Run both on labelled images.

    Args:
        reference: what is right: the checkpoint.
        candidate: the engine, or the graph it was built from.
        dataset: labelled images of the same classes.
        frames: how many of them to take, evenly spread.
        sizes: see `compare`.
    """
    # Both networks see them, at every size.
    some = CachedDataset(Subset(dataset, evenly_spread(len(dataset), frames)))
    pictures = frames_for_comparison(some, count=frames)
    agreement = compare(reference, candidate, pictures, sizes=sizes)
    agreement.say_if_it_proves_little()
    names = reference.metadata.class_names
    ours = evaluate(candidate, some, title="scoring the engine").scores(names)
    theirs = evaluate(reference, some, title="scoring the reference").scores(names)
    iou_drop = {n: _difference(theirs.per_class_iou[n], ours.per_class_iou[n]) for n in names}
    return Drop(agreement, theirs.labelled_miou, ours.labelled_miou, iou_drop)


def require_within(drop: Drop, limits: Limits, *, what: str, layers: Sequence[str] = ()) -> None:
    """Raise VerificationError where more was lost than is allowed, naming the worst classes and the layers given."""
    if drop.within(limits):
        return
    size, share = drop.agreement.worst_size
    worst = f" Layers that add most error: {', '.join(layers)}." if layers else ""
    raise VerificationError(
        f"{what} does not do what the checkpoint does: at {size} they agree on {100 * share:.2f} % of the pixels (at least "
        f"{100 * limits.agreement:g} % required), and mIoU changes by {-100 * drop.miou_drop:+.2f} points (a fall of {100 * limits.miou_drop:g} is allowed). It "
        f"was not kept. Classes that lose most IoU: {', '.join(drop.worst_classes())}.{worst} Try a wider format, if there is one (--fp16 "
        "for int8 and fp8, else --fp32), or say what you accept with --min-agreement and --max-miou-drop."
    )


def _difference(reference: float | None, candidate: float | None) -> float | None:
    return None if reference is None else reference - (candidate or 0.0)
