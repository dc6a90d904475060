"""The overlay: exact colours, untouched pixels, and panels that stay in their place."""

from __future__ import annotations

import numpy as np
import pytest
from video_helpers import CLASSES

from aicsd_deploy.metadata import SegClass
from aicsd_deploy.video.overlay import SEEN_FRAMES, Overlay, legend_panel, text_height_px, text_panel

LABELS = np.array([[0, 1, 1, 255], [1, 0, 7, 0]], np.uint8)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 4, 3), np.uint8)


def test_opacity_one_is_the_class_colour_in_bgr_and_other_labels_are_left_alone() -> None:
    image, before = picture(), picture()
    Overlay(CLASSES, opacity=1, legend=False).draw(image, LABELS)
    np.testing.assert_array_equal(image[LABELS == 0], np.broadcast_to((30, 200, 10), (3, 3)))
    np.testing.assert_array_equal(image[LABELS == 1], np.broadcast_to((120, 0, 250), (3, 3)))
    np.testing.assert_array_equal(image[LABELS > 1], before[LABELS > 1])


def test_opacity_zero_leaves_the_frame_as_it_is() -> None:
    image = picture()
    Overlay(CLASSES, opacity=0, legend=False).draw(image, LABELS)
    np.testing.assert_array_equal(image, picture())


def test_half_opacity_is_half_way_and_ignored_pixels_keep_their_value() -> None:
    image = picture()
    overlay = Overlay(CLASSES, opacity=0.5, legend=False)
    for _ in range(2):  # the second time with buffers that are full of the first
        image = picture()
        overlay.draw(image, LABELS)
    middle = np.mean([picture()[0, 0], (30, 200, 10)], axis=0)
    np.testing.assert_allclose(image[0, 0], middle, atol=0.5)
    np.testing.assert_array_equal(image[LABELS > 1], picture()[LABELS > 1])


def test_labels_may_lie_column_by_column() -> None:
    image, expected = picture(), picture()
    Overlay(CLASSES, legend=False).draw(expected, LABELS)
    Overlay(CLASSES, legend=False).draw(image, np.asfortranarray(LABELS))
    np.testing.assert_array_equal(image, expected)


def test_the_size_may_change_between_frames() -> None:
    overlay = Overlay(CLASSES, opacity=1, legend=False)
    for size_hw in ((4, 6), (9, 3)):
        image = overlay.draw(np.zeros((*size_hw, 3), np.uint8), np.ones(size_hw, np.uint8))
        assert (image == (120, 0, 250)).all()


@pytest.mark.parametrize("size_hw", [(270, 480), (1080, 1920), (1280, 720)])
def test_panels_cover_only_the_upper_left_and_the_bottom(size_hw: tuple[int, int]) -> None:
    classes = tuple(SegClass(f"class number {n}", (n, n, n)) for n in range(11))
    image = np.full((*size_hw, 3), 100, np.uint8)
    labels = np.arange(np.prod(size_hw)).reshape(size_hw).astype(np.uint8) % 11
    Overlay(classes, opacity=0).draw(image, labels, hud="31.5 fps   12.4 ms p50   onnxruntime CPU")
    changed = (image != 100).any(axis=(1, 2))
    assert changed[0]
    assert changed[-1]
    assert not changed[size_hw[0] // 10 : size_hw[0] * 2 // 3].any()


@pytest.mark.parametrize("size_hw", [(1, 1), (16, 16), (40, 500), (500, 40)])
def test_tiny_and_narrow_frames_do_not_break_it(size_hw: tuple[int, int]) -> None:
    image = np.zeros((*size_hw, 3), np.uint8)
    Overlay(CLASSES, opacity=0.5).draw(image, np.zeros(size_hw, np.uint8), hud="31.5 fps")
    assert image.shape == (*size_hw, 3)


def bottom_after(overlay: Overlay, label: int) -> np.ndarray:
    return overlay.draw(np.zeros((200, 300, 3), np.uint8), np.full((200, 300), label, np.uint8))[-20:].copy()


def test_the_legend_lists_the_classes_in_sight_and_forgets_them_later() -> None:
    overlay = Overlay(CLASSES, opacity=0)
    only_dark = bottom_after(overlay, 0)
    both = bottom_after(overlay, 1)
    assert (both != only_dark).any()
    for _ in range(SEEN_FRAMES):
        latest = bottom_after(overlay, 1)
    np.testing.assert_array_equal(latest, bottom_after(Overlay(CLASSES, opacity=0), 1))
    assert (latest != both).any()


def test_the_legend_shows_each_colour_and_breaks_into_rows() -> None:
    classes = tuple(SegClass(f"class {n}", (10 * n, 255 - 10 * n, n)) for n in range(11))
    one_row, rows = legend_panel(classes, (540, 4000)), legend_panel(classes, (540, 480))
    assert len(one_row) == 2 * text_height_px((540, 4000))
    assert len(rows) in [n * 2 * text_height_px((540, 480)) for n in (2, 3)]  # fonts differ between OpenCV versions
    for seg_class in classes:
        assert (rows == seg_class.color_rgb[::-1]).all(axis=2).any()


def test_a_legend_with_too_many_classes_shows_the_rows_that_a_third_of_the_frame_holds() -> None:
    classes = tuple(SegClass(f"class {n}", (5 * n, 255 - 5 * n, n)) for n in range(40))
    panel, row_px = legend_panel(classes, (240, 320)), 2 * text_height_px((240, 320))
    assert 80 - row_px < len(panel) <= 80
    image = np.full((240, 320, 3), 100, np.uint8)
    labels = np.random.default_rng(0).integers(0, 40, (240, 320), np.uint8)
    Overlay(classes, opacity=0).draw(image, labels)
    assert (image != 100).any(axis=(1, 2)).sum() == len(panel)


def test_text_is_never_wider_than_the_frame() -> None:
    assert text_panel("a very long line of text " * 9, (270, 480)).shape[1] == 480
