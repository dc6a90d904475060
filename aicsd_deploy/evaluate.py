"""Any backend, scored on any data set, at the size of its labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from aicsd_deploy.console import progress
from aicsd_deploy.data.dataset import LabelledImage, SegmentationDataset
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.metrics import ConfusionMatrix
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import segment

FrameToLabels = Callable[[UInt8Array], UInt8Array]
"""From a frame, uint8 (H, W, 3) in blue, green, red, to its labels, uint8 (H, W)."""
READERS = 4
"""Images that are read while a GPU segments one: to read a large one takes several times as long."""


def evaluate(
    backend: Backend,
    dataset: SegmentationDataset,
    *,
    title: str = "scoring",
    segmenter: FrameToLabels | None = None,
    share: tuple[int, int] = (0, 1),
) -> ConfusionMatrix:
    """Segment every image and count the pixels.

    Args:
        backend: the network.
        dataset: the images.
        title: what the progress bar says.
        segmenter: what segments a frame; None does what the backend would do in use (`segment`).
        share: (k, n) takes images k, k + n, k + 2n, … only, so that n processes share the work.

    Raises:
        InputError: the artefact and the data set have other classes, so that a score would mean nothing.
    """
    check_same_classes(backend.metadata.classes, dataset.classes, spec=dataset.spec)
    segmenter = partial(segment, backend) if segmenter is None else segmenter
    matrix = ConfusionMatrix(len(dataset.classes))
    indices = range(share[0], len(dataset), share[1])
    with progress(title, len(indices)) as advance:
        for frame_bgr, labels in _loaded(dataset, indices, readers=0 if backend.device == "cpu" else READERS):
            matrix.add(segmenter(frame_bgr), labels)
            advance()
    return matrix


def _loaded(dataset: SegmentationDataset, indices: Sequence[int], *, readers: int) -> Iterator[LabelledImage]:
    """Give frames and labels in order; up to `readers` more are being read meanwhile. With none, nothing takes cores from the network."""
    if not readers:
        yield from map(dataset.load_bgr, indices)
        return
    ahead: deque[Future[LabelledImage]] = deque()
    with ThreadPoolExecutor(readers, thread_name_prefix="reader") as pool:
        for index in indices:
            ahead.append(pool.submit(dataset.load_bgr, index))
            if len(ahead) > readers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def check_same_classes(
    ours: tuple[SegClass, ...], theirs: tuple[SegClass, ...], *, spec: str, artifact: str = "The artefact"
) -> None:
    """Raise InputError unless `artifact` has the very classes, in order, of the data set `spec`."""
    ours_named, theirs_named = [c.name for c in ours], [c.name for c in theirs]
    if ours_named != theirs_named:
        raise InputError(
            f"{artifact}'s classes are not those of {spec}, so its labels mean something else.\n"
            f"  artefact: {len(ours)} classes: {', '.join(ours_named)}\n"
            f"  data set: {len(theirs)} classes: {', '.join(theirs_named)}\n"
            "Give the data set that the network was trained for."
        )
