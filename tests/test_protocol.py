"""Scoring by the papers' protocol: what is averaged, and that nothing shifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.protocol import Protocol, ProtocolSegmenter, _starts
from aicsd_deploy.runtime.frames import resize_image

CLASSES = tuple(SegClass(n, (0, 0, i)) for i, n in enumerate("abc"))
METADATA = Metadata(model="x", classes=CLASSES, image_size_hw=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))


class Brightest(nn.Module):
    """Takes the brightest of red, green and blue as the class: right at every size, wherever a window lies."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(images.shape[2:]))
        return 20 * images


def frame() -> np.ndarray:
    """Blocks of 10 in pure colours, 50x70, blue, green, red."""
    labels = np.kron(np.random.default_rng(0).integers(0, 3, (5, 7)), np.ones((10, 10), np.int64))
    return np.ascontiguousarray((255 * np.eye(3, dtype=np.uint8)[labels])[..., ::-1])


def test_every_way_gives_the_labels_of_a_network_that_is_right_everywhere() -> None:
    truth = frame()[..., ::-1].argmax(axis=2)
    for protocol in (
        Protocol(native=True),
        Protocol(native=True, flip=True),
        Protocol(native=True, window_hw=(32, 48)),
        Protocol(native=True, window_hw=(64, 64)),
        Protocol(native=True, window_hw=(96, 32)),
        Protocol(native=True, window_hw=(32, 96)),
        Protocol(native=True, window_hw=(16, 16), scales=(1.0, 2.0), flip=True),
    ):
        segmenter = ProtocolSegmenter(Brightest(), METADATA, protocol, device=torch.device("cpu"))
        assert (segmenter(frame()) == truth).all(), protocol


class Choosy(Brightest):
    """Takes multiples of 32 only, like most encoders of segmentation_models_pytorch."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        if any(length % 32 for length in images.shape[2:]):
            raise RuntimeError("Wrong input shape")
        return logits


def test_sizes_that_the_network_sees() -> None:
    for kind, protocol, expected in (
        (Brightest, Protocol(native=True), [(50, 70)]),
        (Brightest, Protocol(), [(32, 32)]),
        (Brightest, Protocol(scales=(1.0, 2.0)), [(32, 32), (64, 64)]),
        (Brightest, Protocol(native=True, window_hw=(32, 70)), [(32, 70)] * 2),
        (Brightest, Protocol(native=True, window_hw=(768, 768)), [(50, 70)]),
        (Choosy, Protocol(native=True, flip=True), [(50, 70), (64, 96), (64, 96)]),  # it is asked once
        (Choosy, Protocol(native=True, window_hw=(64, 64)), [(50, 64), (64, 64), (64, 64)]),
    ):
        network = kind()
        segmenter = ProtocolSegmenter(network, METADATA, protocol, device=torch.device("cpu"))
        labels = segmenter(frame())
        assert network.sizes == expected
        assert (labels == frame()[..., ::-1].argmax(axis=2)).all() or not protocol.native


def test_what_is_padded_is_grey() -> None:
    class Last(Choosy):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.images = images
            return super().forward(images)

    network = Last()
    ProtocolSegmenter(network, METADATA, Protocol(native=True), device=torch.device("cpu"))(frame())
    padded = torch.cat([network.images[..., 50:, :].flatten(), network.images[..., 70:].flatten()])
    torch.testing.assert_close(padded, torch.full_like(padded, 114 / 255))


def test_a_lack_of_memory_is_not_taken_for_a_size_that_the_network_refuses() -> None:
    class Large(Brightest):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            if len(self.sizes) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logits

    network = Large()
    segmenter = ProtocolSegmenter(network, METADATA, Protocol(native=True), device=torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        segmenter(frame())
    segmenter(frame())
    assert network.sizes == [(50, 70), (50, 70)]


def test_scales_and_mirror_are_averaged_as_probabilities() -> None:
    class Leaning(nn.Module):
        """Says `a` on the left half and is surer of `b` on the right: mirrored, the surer one wins everywhere."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(1, 3, *images.shape[2:])
            half = images.shape[3] // 2
            logits[:, 0, :, :half], logits[:, 1, :, half:] = 1.0, 2.0
            return logits

    image = np.zeros((32, 64, 3), np.uint8)
    both = ProtocolSegmenter(Leaning(), METADATA, Protocol(native=True, flip=True), device=torch.device("cpu"))
    assert (both(image) == 1).all()
    once = ProtocolSegmenter(Leaning(), METADATA, Protocol(native=True), device=torch.device("cpu"))
    assert once(image)[0, 0] == 0


def test_windows_average_logits_and_scales_and_mirror_probabilities() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 3, 5, stride=2, padding=2).requires_grad_(False)
    convolution.weight *= 20
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    protocol = Protocol(native=True, window_hw=(24, 24), scales=(1.0, 1.5), flip=True)
    segmenter = ProtocolSegmenter(
        nn.Sequential(convolution, nn.Dropout(0.5)), METADATA, protocol, device=torch.device("cpu")
    )
    total = torch.zeros(1, 3, 40, 50)
    for height, width in ((40, 50), (60, 75)):
        image_rgb = resize_image(picture, (height, width))[..., ::-1]
        for turn in (1, -1):
            image = torch.from_numpy(image_rgb[:, ::turn].copy()).permute(2, 0, 1)[None] / 255
            logits, counts = torch.zeros(1, 3, height, width), torch.zeros(height, width)
            for top in {min(start, height - 24) for start in range(0, height, 16)}:
                for left in {min(start, width - 24) for start in range(0, width, 16)}:
                    part = (..., slice(top, top + 24), slice(left, left + 24))
                    logits[part] += F.interpolate(convolution(image[part]), size=(24, 24), mode="bilinear")
                    counts[part] += 1
            logits = logits / counts
            logits = logits if turn == 1 else logits.flip(3)
            total += F.interpolate(logits, size=(40, 50), mode="bilinear").softmax(dim=1)
    assert (segmenter(picture) == total.argmax(dim=1)[0].numpy()).mean() > 0.999


def test_windows_cover_everything_and_overlap() -> None:
    assert list(_starts(100, 100)) == [0]
    assert list(_starts(200, 100)) == [0, 66, 100]
    covered = np.zeros(333, bool)
    for start in _starts(333, 90):
        covered[start : start + 90] = True
    assert covered.all()
