"""What happens to labels after the network: smoothing, files for other programs, scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from video_helpers import CLASSES, Numbered, Threshold, room_for_files

from aicsd_deploy.errors import InputError
from aicsd_deploy.files import write_png
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.video.label_sinks import SPARE_BYTES, PngSink, RleSink, run_lengths
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.scoring import Scorer, true_labels
from aicsd_deploy.video.sinks import Sink, SinkGroup
from aicsd_deploy.video.smooth import LabelSmoother
from aicsd_deploy.video.sources import FolderSource, Frame, open_source

NAMES = ["a", "b", "c"]


def smoothed(values: list[int], frames: int) -> list[int]:
    """What one pixel becomes; the rest of the picture stands still, so that nothing is taken for a cut."""
    smoother = LabelSmoother(frames)
    shown = []
    for value in values:
        labels = np.zeros((16, 16), np.uint8)
        labels[3, 5] = value
        result = smoother(labels)
        assert not result[:3].any()
        shown.append(int(result[3, 5]))
    return shown


def test_a_new_label_is_shown_once_it_has_lasted() -> None:
    assert smoothed([0, 1, 0, 1, 1, 1, 0], 1) == [0, 1, 0, 1, 1, 1, 0]
    assert smoothed([0, 1, 0, 1, 1, 1, 0, 0], 2) == [0, 0, 0, 0, 1, 1, 0, 0]  # what lies all around comes back at once
    assert smoothed([0, 1, 1, 2, 2, 2, 1], 3) == [0, 0, 0, 0, 0, 2, 2]


def test_borders_move_at_once() -> None:
    smoother = LabelSmoother(9)
    for column in range(20, 40):
        labels = np.zeros((44, 60), np.uint8)
        labels[:, column:] = 1
        np.testing.assert_array_equal(smoother(labels), labels)


@pytest.mark.parametrize("turns", range(4))
def test_a_border_moves_at_once_by_a_twenty_second_of_the_height_and_no_further(turns: int) -> None:
    def half(border: int) -> np.ndarray:
        return np.rot90((np.arange(44) >= border).astype(np.uint8)[None].repeat(44, 0), turns).copy()

    smoother = LabelSmoother(9)
    smoother(half(20))
    np.testing.assert_array_equal(smoother(half(18)), half(18))
    np.testing.assert_array_equal(smoother(half(14)), half(16))


def test_smoothing_begins_anew_at_a_cut() -> None:
    smoother = LabelSmoother(5)
    smoother(np.zeros((16, 16), np.uint8))
    assert smoother(np.ones((16, 16), np.uint8)).all()


def test_what_smoothing_gave_out_is_not_changed_later() -> None:
    smoother = LabelSmoother(2)
    labels = [np.full((16, 16), value, np.uint8) for value in (0, 1, 1, 1, 1)]
    labels[3][:4] = labels[4][:4] = 0
    given, then = [], []
    for one in labels:
        given.append(smoother(one))
        then.append(given[-1].copy())
    np.testing.assert_array_equal(given, then)
    assert given[2].any(), "what was shown did change"
    assert not given[4].all(), "what was shown did change"


def frames_of(*labels: np.ndarray) -> list[Frame]:
    return [Frame(n, np.zeros((*one.shape, 3), np.uint8), n / 25, labels=one) for n, one in enumerate(labels)]


def write_all(sink: Sink, frames: list[Frame]) -> None:
    with sink.open(Numbered(len(frames))):
        for frame in frames:
            assert sink.write(frame)


def test_png_label_maps(tmp_path: Path) -> None:
    maps = [np.random.default_rng(n).integers(0, 2, (7, 9), np.uint8) for n in range(3)]
    write_all(PngSink(tmp_path / "maps", CLASSES), frames_of(*maps))
    for number, labels in enumerate(maps):
        read = Image.open(tmp_path / "maps" / f"frame_{number:06d}.png")
        assert read.mode == "L"
        np.testing.assert_array_equal(np.asarray(read), labels)
    assert (tmp_path / "maps/classes.txt").read_text() == "0 dark 10 200 30\n1 bright 250 0 120\n"
    assert (tmp_path / "maps/times.txt").read_text().splitlines()[2] == "frame_000002.png 0.080000"


def test_label_maps_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "frame_000000.png").touch()
    with pytest.raises(InputError, match="not empty"):
        PngSink(tmp_path, CLASSES)


def decode(counts: list[int], size: list[int]) -> np.ndarray:
    """Undo run lengths as COCO defines them: outside first, column by column."""
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    flat = np.concatenate([flat, np.zeros(size[0] * size[1] - flat.size, int)])
    return flat.reshape(size, order="F").astype(bool)


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_give_the_labels_back(seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 4, (5, 8), np.uint8)  # 3 has no name
    found = run_lengths(labels, NAMES)
    assert found["size"] == [5, 8]
    for value, name in enumerate(NAMES):
        if (labels == value).any():
            np.testing.assert_array_equal(decode(found["classes"][name], found["size"]), labels == value)
    assert set(found["classes"]) <= set(NAMES)
    assert run_lengths(np.zeros((2, 3), np.uint8), NAMES)["classes"] == {"a": [0, 6]}


def test_a_line_of_json_per_frame(tmp_path: Path) -> None:
    write_all(RleSink(tmp_path / "labels.jsonl", CLASSES), frames_of(*[np.ones((2, 3), np.uint8)] * 2))
    lines = (tmp_path / "labels.jsonl").read_text().splitlines()
    for number, (line, time_s) in enumerate(zip(lines, (0.0, 0.04), strict=True)):
        assert json.loads(line) == {"frame": number, "time_s": time_s, "size": [2, 3], "classes": {"bright": [0, 6]}}


def test_labels_of_a_folder_name_their_pictures(tmp_path: Path) -> None:
    for number, value in ((2, 40), (10, 200)):
        write_png(tmp_path / f"in/my img{number}.png", np.full((4, 6, 3), value, np.uint8))
    (tmp_path / "in/my img3.png").write_bytes(b"damaged")
    frames = [replace(frame, labels=frame.image_bgr[..., 0]) for frame in FolderSource(tmp_path / "in")]
    write_all(PngSink(tmp_path / "maps", CLASSES), frames)
    times = (tmp_path / "maps/times.txt").read_text()
    assert times == "frame_000000.png 0.000000 my img2.png\nframe_000001.png 0.040000 my img10.png\n"
    write_all(RleSink(tmp_path / "labels.jsonl", CLASSES), frames)
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [line["picture"] for line in lines] == ["my img2.png", "my img10.png"]


def test_the_name_of_a_picture_may_be_no_utf8(tmp_path: Path) -> None:
    sink = PngSink(tmp_path / "maps", CLASSES)
    sink.open(Numbered(1))
    labels = np.zeros((2, 2), np.uint8)
    sink.write(Frame(0, np.zeros((2, 2, 3), np.uint8), 0.0, labels=labels, picture="caf\udce9.png"))
    sink.close(None)
    assert (tmp_path / "maps/times.txt").read_bytes().endswith(b" caf\xe9.png\n")


def test_an_error_keeps_the_lines_until_then_under_another_name(tmp_path: Path) -> None:
    frames = frames_of(*[np.ones((2, 3), np.uint8)] * 9)
    with room_for_files(180), pytest.raises(OSError, match=r"too large: .*labels\.jsonl"):
        write_all(RleSink(tmp_path / "labels.jsonl", CLASSES), frames)
    (partial,) = tmp_path.iterdir()
    assert partial.name == "labels.partial.jsonl"
    assert [json.loads(line)["frame"] for line in partial.read_text().splitlines()] == [0, 1]


def test_ctrl_c_keeps_the_lines_under_their_name(tmp_path: Path) -> None:
    sink = RleSink(tmp_path / "labels.jsonl", CLASSES).open(Numbered(1))
    sink.write(frames_of(np.ones((2, 3), np.uint8))[0])
    sink.close(KeyboardInterrupt())
    assert [p.name for p in tmp_path.iterdir()] == ["labels.jsonl"]


@pytest.mark.parametrize(("kind", "name"), [(RleSink, "labels.jsonl"), (PngSink, "frame_000000.png")])
def test_a_full_disk_is_reported_with_the_file(kind: Any, name: str, tmp_path: Path) -> None:
    sink = kind(tmp_path / "labels.jsonl", CLASSES)
    with room_for_files(0), pytest.raises(OSError, match=rf"too large: .*{name}"):
        write_all(sink, frames_of(np.ones((2, 3), np.uint8)))
    assert list(tmp_path.iterdir()) == []


def test_label_maps_leave_room_on_a_disk_that_fills_up_for_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=SPARE_BYTES + 3000 - sum(path.stat().st_size for path in folder.iterdir()))

    monkeypatch.setattr("aicsd_deploy.video.sinks.shutil.disk_usage", disk_usage)
    frames = frames_of(*[np.ones((20, 30), np.uint8)] * 100)
    with pytest.raises(OSError, match=r"No space left on device: '.*maps'"):
        write_all(PngSink(tmp_path / "maps", CLASSES), frames)
    kept = sorted(path.name for path in (tmp_path / "maps").glob("*.png"))
    assert 3 < len(kept) < 100
    assert [line.split()[0] for line in (tmp_path / "maps/times.txt").read_text().splitlines()] == kept
    assert "kept in" in capsys.readouterr().err
    assert disk_usage(tmp_path / "maps").free > SPARE_BYTES / 2


def test_a_disk_without_room_for_the_first_label_map_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "aicsd_deploy.video.sinks.shutil.disk_usage", lambda folder: SimpleNamespace(free=SPARE_BYTES - 1)
    )
    for folder in (tmp_path / "maps", tmp_path / "new" / "maps"):
        with pytest.raises(OSError, match=r"No space left on device: '.*maps'"):
            write_all(PngSink(folder, CLASSES), frames_of(np.ones((2, 3), np.uint8)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_frame(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write"):
        PngSink(tmp_path / "file" / "maps", CLASSES).open(Numbered(1))
    PngSink(tmp_path / "maps", CLASSES).open(Numbered(1))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_scores_and_flicker() -> None:
    true = np.zeros((4, 10), np.uint8)
    true[:, 5:] = 1
    true[0] = 255
    wrong = true.copy()
    wrong[1:, 0] = 1  # 3 of 30 pixels
    scorer = Scorer(lambda index: true, 3, ["a", "b"])
    write_all(scorer, frames_of(*(np.where(one == 255, 0, one).astype(np.uint8) for one in (true, wrong, true))))
    result = scorer.result()
    assert result["pixel_accuracy"] == pytest.approx(1 - 3 / 90)
    assert result["per_class_iou"]["b"] == pytest.approx(45 / 48)
    assert result["flicker_rate"] == pytest.approx(6 / 60)
    assert result["images"] == 3


def test_pixels_whose_true_class_changes_do_not_count_as_flicker() -> None:
    maps = [np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)]
    scorer = Scorer(lambda index: maps[index], 2, ["a", "b"])
    write_all(scorer, frames_of(*maps))
    assert scorer.result()["flicker_rate"] is None


def test_frames_with_others_missing_between_them_do_not_count_as_flicker() -> None:
    true = np.zeros((4, 4), np.uint8)
    scorer = Scorer(lambda index: true, 3, ["a", "b"])
    first, _, third = frames_of(true, true, true + 1)
    write_all(scorer, [first, third])
    assert scorer.result()["flicker_rate"] is None


def test_scores_are_taken_at_the_size_of_the_true_labels() -> None:
    true = np.eye(6, dtype=np.uint8)
    true[0] = 255
    scorer = Scorer(lambda index: true.repeat(2, 0).repeat(3, 1), 1, ["a", "b"])
    write_all(scorer, frames_of(np.eye(6, dtype=np.uint8)))
    assert scorer.result()["miou"] == 1
    assert scorer.result()["label_pixels"] == {"a": 25 * 6, "b": 5 * 6}


def test_a_frame_after_the_last_label_map_is_refused() -> None:
    scorer = Scorer(lambda index: np.zeros((4, 4), np.uint8), 2, ["a", "b"])
    scorer.open(Numbered(2))  # the header of the file says that there are no more
    *first, last = frames_of(*[np.zeros((4, 4), np.uint8)] * 3)
    assert all(map(scorer.write, first))
    with pytest.raises(InputError, match="Frame 2 has no labels: there are only 2"):
        scorer.write(last)


def test_values_that_no_class_has_are_ignored_in_a_folder_of_label_maps(tmp_path: Path) -> None:
    write_png(tmp_path / "0.png", np.array([[0, 1, 2, 254, 255]], np.uint8))
    labels_of, _ = true_labels(str(tmp_path), "val", CLASSES)  # of two classes
    assert labels_of(0).tolist() == [[0, 1, 255, 255, 255]]


def test_a_video_is_scored_through_the_pipeline(tmp_path: Path) -> None:
    for number in range(40):
        Image.fromarray(np.full((24, 32), int(number * 4 > 127), np.uint8)).save(tmp_path / f"{number:03d}.png")
    scorer = Scorer(*true_labels(str(tmp_path), "val", CLASSES), ["dark", "bright"])
    process_video(Numbered(40), Threshold(), SinkGroup([scorer]), overlay=Overlay(CLASSES))
    assert scorer.result()["miou"] == 1.0
    with pytest.raises(InputError, match="only 40"):
        process_video(Numbered(41), Threshold(), scorer, overlay=Overlay(CLASSES))


@pytest.mark.parametrize("frames", [3, 0])
def test_label_maps_that_no_frame_used_are_told(frames: int, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = Scorer(lambda index: np.zeros((4, 4), np.uint8), 3, ["a", "b"])
    write_all(scorer, frames_of(*[np.zeros((4, 4), np.uint8)] * frames))
    scorer.warn_of_the_rest()
    said = capsys.readouterr().err
    assert said == "" if frames == 3 else "has 0 frames, but --labels has 3 label maps" in said


def test_label_maps_are_taken_in_the_order_of_the_pictures_of_a_folder(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for number in range(9, 12):
            value = (number % 2) * (1 if kind == "labels" else 255)
            Image.fromarray(np.full((24, 32), value, np.uint8)).save(tmp_path / kind / f"f{number}.png")
    scorer = Scorer(*true_labels(str(tmp_path / "labels"), "val", CLASSES), ["dark", "bright"])
    with open_source(str(tmp_path / "images")) as source:
        process_video(source, Threshold(), scorer, overlay=Overlay(CLASSES))
    assert scorer.result()["miou"] == 1.0


def test_a_video_with_frames_that_are_missing_is_not_scored(tmp_path: Path) -> None:
    for number in range(5):
        Image.fromarray(np.zeros((24, 32), np.uint8)).save(tmp_path / f"{number}.png")
    scorer = Scorer(*true_labels(str(tmp_path), "val", CLASSES), ["dark", "bright"])
    (tmp_path / "1.png").write_text("damaged")
    with open_source(str(tmp_path)) as source, pytest.raises(InputError, match="cannot be decoded"):
        process_video(source, Threshold(), scorer, overlay=Overlay(CLASSES))


def test_a_pipeline_shows_smoothed_labels() -> None:
    """Frames 0 and 1 are dark, 2 is bright in a corner, 3 is dark again."""

    class Flickering(Numbered):
        def __iter__(self) -> Iterator[Frame]:
            for frame in super().__iter__():
                frame.image_bgr[:] = 0
                frame.image_bgr[:4, :4] = 255 * (frame.index == 2)
                yield frame

    for smooth, bright in ((1, [0, 0, 16, 0]), (2, [0, 0, 0, 0])):
        seen: list[int] = []

        class Count(Sink):
            name, wants_overlay = "count", False

            def write(self, frame: Frame, seen: list[int] = seen) -> bool:
                assert frame.labels is not None
                seen.append(int(frame.labels.sum()))
                return True

        process_video(Flickering(4), Threshold(), Count(), overlay=Overlay(CLASSES), smooth=smooth)
        assert seen == bright


def test_labels_come_from_a_data_set_with_the_same_classes(folder_data: Path) -> None:
    classes = (SegClass("red", (1, 1, 1)), SegClass("green", (1, 1, 1)), SegClass("blue", (1, 1, 1)))
    labels_of, count = true_labels(f"folder:{folder_data}", "val", classes)
    assert count == 4
    assert (labels_of(0)[:2] == 255).all()
    with pytest.raises(InputError, match="classes"):
        true_labels(f"folder:{folder_data}", "val", CLASSES)
    with pytest.raises(InputError, match="holds no label maps"):
        true_labels(str(folder_data), "val", CLASSES)
    with pytest.raises(InputError, match=r"no folder .*missing"):
        true_labels(str(folder_data / "missing"), "val", CLASSES)


def test_only_some_classes_are_shown() -> None:
    image = np.full((40, 60, 3), 100, np.uint8)
    labels = np.repeat(np.array([[0], [1]], np.uint8), 20, axis=0).repeat(60, axis=1)
    Overlay(CLASSES, opacity=1, legend=False, shown=["bright"]).draw(image, labels)
    assert (image[:20] == 100).all()
    assert (image[20:] == (120, 0, 250)).all()
    with pytest.raises(InputError, match=r"no class 'sky'\. It has: dark, bright"):
        Overlay(CLASSES, shown=["sky"])


def test_contours_are_lines_along_the_borders() -> None:
    image = np.full((40, 60, 3), 100, np.uint8)
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    Overlay(CLASSES, opacity=1, legend=False, contour=True).draw(image, labels)
    changed = (image != 100).any(axis=2)
    assert changed[:, 29:31].all()
    assert not changed[:, :26].any()
    assert not changed[:, 34:].any()


def test_the_legend_lists_only_the_classes_that_are_shown() -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    Overlay(CLASSES, opacity=0, shown=["bright"]).draw(image, np.zeros((200, 300), np.uint8))
    assert not image.any()


def test_a_sink_that_wants_plain_frames_gets_them_beside_drawn_ones() -> None:
    seen: dict[str, list[Frame]] = {"plain": [], "drawn": []}

    class Keep(Sink):
        def __init__(self, name: str) -> None:
            self.name, self.wants_overlay, self.wants_plain = name, name == "drawn", name == "plain"

        def write(self, frame: Frame) -> bool:
            seen[self.name].append(frame)
            return True

    overlay = Overlay(CLASSES, opacity=1, legend=False)
    process_video(Numbered(3), Threshold(), SinkGroup([Keep("plain"), Keep("drawn")]), overlay=overlay)
    for number, (plain, drawn) in enumerate(zip(*seen.values(), strict=True)):
        assert plain.plain_bgr is not None
        assert (plain.plain_bgr == 4 * number).all()
        assert (drawn.image_bgr == (30, 200, 10)).all()
        assert cv2.countNonZero(plain.labels) == 0
