"""Files that cameras, phones and broken downloads leave behind: every frame that can be decoded, or one clear message."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from video_helpers import CLASSES, Numbered, Threshold, encode, grey_frames, read_back

from aicsd_deploy.errors import InputError
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.sources import open_source
from aicsd_deploy.video.timestamps import Timeline
from aicsd_deploy.video.video_writer import Mp4Sink

COUNT = 12
TIMES_MS = [0, 40, 45, 200, 201, 300, 310, 400, 500, 505, 700, 1000]


def odd_size(path: Path) -> Path:
    return encode(path.with_suffix(".mp4"), grey_frames(COUNT, (47, 63)), pix_fmt="yuv444p")


def full_chroma(path: Path) -> Path:
    return encode(path.with_suffix(".mp4"), grey_frames(COUNT), pix_fmt="yuv444p")


def grey(path: Path) -> Path:
    return encode(path.with_suffix(".mkv"), grey_frames(COUNT), codec="ffv1", pix_fmt="gray")


def motion_jpeg(path: Path) -> Path:
    return encode(path.with_suffix(".avi"), grey_frames(COUNT), codec="mjpeg", pix_fmt="yuvj420p")


def vp9(path: Path) -> Path:
    return encode(path.with_suffix(".webm"), grey_frames(COUNT), codec="libvpx-vp9", time_base=Fraction(1, 25))


def hevc(path: Path) -> Path:
    # In one thread: the tests have stood still here once, on a busy machine, with x265's own threads.
    single = {"x265-params": "pools=none:frame-threads=1:log-level=warning"}
    return encode(path.with_suffix(".mp4"), grey_frames(COUNT), codec="libx265", options=single)


def rotated(path: Path) -> Path:
    return encode(path.with_suffix(".mp4"), grey_frames(COUNT), rotation=(90.0, False, False))


def variable_rate(path: Path) -> Path:
    return encode(path.with_suffix(".mp4"), grey_frames(COUNT), pts=TIMES_MS, time_base=Fraction(1, 1000))


def animated_gif(path: Path) -> Path:
    return encode(path.with_suffix(".gif"), grey_frames(COUNT), codec="gif", pix_fmt="gray")


def wrong_count(path: Path) -> Path:
    """The header of an AVI says how many frames there are; here it lies."""
    path = motion_jpeg(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"avih") + 8 + 16
    assert int.from_bytes(data[at : at + 4], "little") == COUNT
    data[at : at + 4] = (9999).to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "make",
    [odd_size, full_chroma, grey, motion_jpeg, vp9, hevc, rotated, variable_rate, animated_gif, wrong_count],
)
def test_every_frame_comes_out_in_order_at_its_time(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "in")
    expected_times, _ = read_back(path)
    with open_source(str(path)) as source:
        overlay = Overlay(CLASSES, opacity=0, legend=False)
        result = process_video(source, Threshold(), Mp4Sink(tmp_path / "out.mp4"), overlay=overlay)
        assert source.size_hw == ((64, 48) if make is rotated else (47, 63) if make is odd_size else (48, 64))
    times, images = read_back(tmp_path / "out.mp4")
    assert (result.frames_in, result.frames_out, result.skipped) == (COUNT, COUNT, 0)
    assert times == pytest.approx([t - expected_times[0] for t in expected_times], abs=2e-3)
    assert (np.diff([image.mean() for image in images]) > 1).all(), "the grey values of the frames rise"


def joined(path: Path) -> Path:
    """Two transport streams in one file: the time stamps begin anew in the middle."""
    part = encode(path.with_name("part.ts"), grey_frames(COUNT)).read_bytes()
    path.with_suffix(".ts").write_bytes(part + part)
    return path.with_suffix(".ts")


def out_of_order(path: Path) -> Path:
    """Pictures that are coded out of order, in a container that has no presentation times."""
    return encode(path.with_suffix(".avi"), noise(COUNT), time_base=Fraction(1, 25))


@pytest.mark.parametrize(("make", "count"), [(joined, 2 * COUNT), (out_of_order, COUNT)])
def test_times_go_evenly_where_the_stamps_do_not(make: Callable[[Path], Path], count: int, tmp_path: Path) -> None:
    path = make(tmp_path / "in")
    assert np.diff(read_back(path)[0]).min() < 0, "the file is as bad as it should be"
    with open_source(str(path)) as source:
        times = [frame.time_s for frame in source]
    assert times == pytest.approx([number / 25 for number in range(count)], abs=2e-3)


def test_a_jump_ahead_is_one_only_where_the_format_may_jump() -> None:
    stamps = [100, 101, None, 99_999, 103, 103, 102, 200, 6, 7]

    def times(may_jump: bool) -> list[float]:
        line = Timeline(start_s=Fraction(100), step_s=Fraction(1, 2), may_jump=may_jump)
        for stamp in stamps:
            if stamp is not None:
                line.note(Fraction(stamp), stream=0)
        return [float(line.place(None if stamp is None else Fraction(stamp))) for stamp in stamps]

    # one stamp is hours off, one is there twice, one goes back a little more than it may, then the clock begins anew
    assert times(True) == [0, 1, 1.5, 2, 2.5, 2.5, 3, 3.5, 4, 5]
    assert times(False)[:4] == [0, 1, 1.5, 99_899]


def test_pictures_that_are_stamped_out_of_order_keep_their_times() -> None:
    line = Timeline(start_s=Fraction(0), step_s=Fraction(1, 25), may_jump=True)
    stamps_s = [Fraction(number, 25) for number in (0, 4, 1, 3, 2, 5)]
    assert [line.place(stamp_s) for stamp_s in stamps_s] == stamps_s


@pytest.mark.parametrize(("suffix", "orientation", "size_hw"), [(".tiff", 1, (48, 64)), (".jpg", 6, (64, 48))])
def test_a_picture_with_exif_is_read_and_turned(
    suffix: str, orientation: int, size_hw: tuple[int, int], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32] = 200  # the left half is what orientation 6 has on top
    Image.fromarray(image).save(tmp_path / f"in{suffix}", exif=exif)
    with open_source(str(tmp_path / f"in{suffix}")) as source:
        (frame,) = source
    assert source.size_hw == size_hw
    assert frame.image_bgr[:20, :20].mean() > 180
    assert frame.image_bgr[-20:, -20:].mean() < 20


DURATIONS_MS = [40, 40, 100, 40, 200, 40]


@pytest.mark.parametrize("suffix", [".avif", ".webp", ".gif", ".png"])
def test_an_animated_picture_gives_every_frame_at_its_time(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{suffix}"
    first, *more = [Image.fromarray(image) for image in grey_frames(6)]
    try:
        first.save(path, save_all=True, append_images=more, duration=DURATIONS_MS, lossless=True)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {suffix}")
    with open_source(str(path)) as source:
        if suffix == ".webp" and not hasattr(cv2, "imdecodeanimation"):
            pytest.skip("OpenCV decodes animated WebP from 4.11 on")
        frames = list(source)
    assert source.size_hw == (48, 64)
    assert [frame.time_s for frame in frames] == pytest.approx(np.cumsum([0, *DURATIONS_MS[:-1]]) / 1000)
    np.testing.assert_allclose([f.image_bgr.mean() for f in frames], [i.mean() for i in grey_frames(6)], atol=3)


def test_a_damaged_animated_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.webp"
    first, *more = [Image.fromarray(image) for image in grey_frames(6)]
    first.save(path, save_all=True, append_images=more, duration=40)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match="damaged or cut off"):
        open_source(str(path))


def test_names_and_titles_in_another_encoding_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "in.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf\u00e9"
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey_frames(1)[0], format="bgr24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace("caf\u00e9".encode(), b"caf\xe9 "))
    with open_source(str(path)) as source:
        assert len(list(source)) == 1


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "cam ! one.mp4", "50%03d.mp4", "file:y.mp4"])
def test_a_file_is_read_whatever_its_name_could_mean(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encode(Path("in.mp4"), grey_frames(3)).rename(name)
    with open_source(name) as source:
        assert (len(list(source)), source.name) == (3, name)


@pytest.mark.parametrize(
    ("name", "is_pipeline"),
    [
        ("videotestsrc!appsink", True),
        ("v4l2src device=/dev/video0 !videoconvert", True),
        ("v4l2src! video/x-raw,width=640 !videoconvert", True),
        ("rtspsrc location=rtsp://cam/1 ! decodebin", True),
        ("videotestsrc\n!\nvideoconvert", True),
        ("v4l2src device=/dev/video1 io-mode=2", True),
        ("videotestsrc", True),
        ("my src.mp4", False),
        ("what a day!.mp4", False),
        ("a!b.mp4", False),
        ("2024!new/a.mp4", False),
    ],
)
def test_a_pipeline_is_told_from_a_file_that_is_not_there(
    name: str, is_pipeline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicsd_deploy.video.streams.open_gstreamer", lambda spec: spec)
    if is_pipeline:
        assert open_source(name) == name
    else:
        with pytest.raises(InputError, match="does not exist"):
            open_source(name)


def test_a_pipeline_longer_than_a_file_name_may_be_is_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = "videotestsrc" + " ! videoconvert" * 30
    monkeypatch.setattr("aicsd_deploy.video.streams.open_gstreamer", lambda spec: spec)
    assert open_source(pipeline) == pipeline


def test_a_picture_named_like_a_series_is_one_picture(tmp_path: Path) -> None:
    for name in ("img1.png", "img2.png", "img%d.png"):
        Image.fromarray(grey_frames(1)[0]).save(tmp_path / name)
    with open_source(str(tmp_path / "img%d.png")) as source:
        assert len(list(source)) == 1


def test_an_address_of_a_file_is_that_file(tmp_path: Path) -> None:
    path = encode(tmp_path / "in it.mp4", grey_frames(3))
    with open_source(path.as_uri()) as source, pytest.raises(InputError, match="would be lost"):
        Mp4Sink(path).open(source)


@pytest.mark.parametrize("rotation", [None, (90.0, False, False)])
@pytest.mark.parametrize("size_hw", [(48, 64), (64, 64)])
def test_the_shape_of_pixels_is_kept(
    rotation: tuple[float, bool, bool] | None, size_hw: tuple[int, int], tmp_path: Path
) -> None:
    images = grey_frames(3, size_hw)
    path = encode(tmp_path / "in.mp4", images, rotation=rotation, pixel_aspect=Fraction(4, 3))
    with open_source(str(path)) as source:
        process_video(source, Threshold(), Mp4Sink(tmp_path / "out.mp4"), overlay=Overlay(CLASSES))
    with av.open(str(tmp_path / "out.mp4")) as container:
        found = container.streams.video[0].sample_aspect_ratio
    assert found == (Fraction(4, 3) if rotation is None else Fraction(3, 4))


def test_frames_too_large_for_h264_are_refused(tmp_path: Path) -> None:
    source = Numbered(2, size_hw=(4, 20_000))
    with pytest.raises(InputError, match="20000x4"):
        Mp4Sink(tmp_path / "out.mp4").open(source)
    assert list(tmp_path.iterdir()) == []


def test_one_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "one.mp4", grey_frames(1))
    with open_source(str(path)) as source:
        process_video(source, Threshold(), Mp4Sink(tmp_path / "out.mp4"), overlay=Overlay(CLASSES))
    assert len(read_back(tmp_path / "out.mp4")[0]) == 1


def noise(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize("faststart", [True, False])
def test_a_truncated_mp4_gives_its_frames_if_the_index_stands_in_front(tmp_path: Path, faststart: bool) -> None:
    path = encode(tmp_path / "cut.mp4", noise(30))
    if faststart:
        with (
            av.open(str(path)) as old,
            av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "+faststart"}) as new,
        ):
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        path = tmp_path / "fast.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    if not faststart:
        with pytest.raises(InputError, match="not a video that can be read"):
            open_source(str(path))
        return
    with open_source(str(path)) as source:
        frames = list(source)
    assert 10 <= len(frames) < 30
    assert [f.index for f in frames] == list(range(len(frames)))


@pytest.fixture
def with_sound(tmp_path: Path) -> Path:
    """A second of video with AAC sound."""
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("aac", rate=16000)
        for image in grey_frames(25):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        for number in range(16):
            samples = np.sin(np.arange(1024) / 5, dtype=np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, number * 1024
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path


def test_sound_is_copied_packet_by_packet(with_sound: Path, tmp_path: Path) -> None:
    with open_source(str(with_sound)) as source:
        sink = Mp4Sink(tmp_path / "out.mp4", audio_of=str(with_sound))
        process_video(source, Threshold(), sink, overlay=Overlay(CLASSES), max_frames=20)
    with av.open(str(with_sound)) as old, av.open(str(tmp_path / "out.mp4")) as new:
        before = [(p.pts * p.time_base, bytes(p)) for p in old.demux(audio=0) if p.size]
        after = [(p.pts * p.time_base, bytes(p)) for p in new.demux(audio=0) if p.size]
    assert after == before[: len(after)]
    assert after[-1][0] == pytest.approx(20 / 25, abs=0.07)
    assert len(read_back(tmp_path / "out.mp4")[0]) == 20


def test_sound_of_joined_files_goes_on(with_sound: Path, tmp_path: Path) -> None:
    with av.open(str(with_sound)) as old, av.open(str(tmp_path / "part.ts"), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    path = tmp_path / "joined.ts"
    path.write_bytes((tmp_path / "part.ts").read_bytes() * 2)
    with open_source(str(path)) as source:
        sink = Mp4Sink(tmp_path / "out.mkv", audio_of=str(path))
        process_video(source, Threshold(), sink, overlay=Overlay(CLASSES))
    with av.open(str(tmp_path / "out.mkv")) as container:
        times = [float(p.pts * p.time_base) for p in container.demux(audio=0) if p.size]
    assert np.diff(times) == pytest.approx(0.064, abs=0.03)  # 1024 samples, at 16 kHz
    assert times[-1] > 1.8


def test_the_sound_goes_on_through_a_pause_of_the_picture(with_sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "pause.ts"
    with av.open(str(with_sound)) as old, av.open(str(path), "w") as new:
        video, audio = (new.add_stream_from_template(kind[0]) for kind in (old.streams.video, old.streams.audio))
        packets = [packet for packet in old.demux(video=0, audio=0) if packet.size]
        sounds = [packet for packet in packets if packet.stream.type == "audio"]
        out = [(float(n * 0.064), bytes(sounds[n % len(sounds)]), audio) for n in range(250)]
        pictures = [packet for packet in packets if packet.stream.type == "video"]
        out += [(n / 25 + 13 * (n >= 12), bytes(packet), video) for n, packet in enumerate(pictures)]
        for time_s, data, stream in sorted(out, key=lambda item: item[0]):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 90_000)
            packet.dts = packet.pts = round(time_s * 90_000)
            new.mux(packet)
    with open_source(str(path)) as source:
        sink = Mp4Sink(tmp_path / "out.mkv", audio_of=str(path))
        process_video(source, Threshold(), sink, overlay=Overlay(CLASSES))
    times = read_back(tmp_path / "out.mkv")[0]
    assert np.diff(times).max() == pytest.approx(13.04, abs=0.01)
    with av.open(str(tmp_path / "out.mkv")) as container:
        sound = [float(p.pts * p.time_base) for p in container.demux(audio=0) if p.size]
    assert np.diff(sound) == pytest.approx(0.064, abs=0.03)
    assert sound[-1] == pytest.approx(times[-1], abs=0.1)


def test_picture_and_sound_that_both_jump_go_on_together() -> None:
    lines = [Timeline(start_s=Fraction(0), step_s=Fraction(1), may_jump=True) for _ in range(2)]
    # the sound pauses from 2 to 16, where the picture goes on; at 500 the clock is another one; last, it begins anew
    stamps = [(0, 0), (1, 0), (0, 1), (1, 1), *((0, n) for n in range(2, 16)), (1, 16), (0, 16), (1, 500), (0, 500)]
    stamps += [(0, 0), (1, 501), (0, 1), (1, 0), (1, 1)]
    times: list[list[int]] = [[], []]
    for stream, stamp in stamps:
        for line in lines:
            line.note(Fraction(stamp), stream=stream)
        times[stream].append(int(lines[stream].place(Fraction(stamp))))
    assert times == [list(range(20)), [0, 1, 16, 17, 18, 19, 20]]


def test_a_pause_that_is_cut_short_is_cut_in_the_sound_too(with_sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "pause.mkv"
    with av.open(str(with_sound)) as old, av.open(str(path), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                late = 0 if packet.pts * packet.time_base < 0.45 else int(20_000 / packet.time_base)
                packet.dts, packet.pts = packet.dts + late, packet.pts + late
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    with open_source(str(path)) as source:
        sink = Mp4Sink(tmp_path / "out.mp4", audio_of=str(path))
        process_video(source, Threshold(), sink, overlay=Overlay(CLASSES))
    with av.open(str(tmp_path / "out.mp4")) as container:
        sound = [float(p.pts * p.time_base) for p in container.demux(audio=0) if p.size]
    picture = read_back(tmp_path / "out.mp4")[0]
    assert 16_000 < np.diff(picture).max() < 17_000
    after = [time_s for time_s in sound if time_s > 10]
    assert len(after) >= 8
    assert (after[0], after[-1]) == pytest.approx((next(t for t in picture if t > 10), picture[-1]), abs=0.09)


@pytest.mark.parametrize(("suffix", "says"), [(".mp4", "has no sound"), (".mkv", "has no sound")])
def test_a_video_without_sound_is_refused_and_nothing_is_left(tmp_path: Path, suffix: str, says: str) -> None:
    path = encode(tmp_path / "in.mp4", grey_frames(3))
    with open_source(str(path)) as source, pytest.raises(InputError, match=says):
        Mp4Sink(tmp_path / "new" / f"out{suffix}", audio_of=str(path)).open(source)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for open files as Linux shows them")
def test_the_file_with_the_sound_is_closed(with_sound: Path, tmp_path: Path) -> None:
    sink = Mp4Sink(tmp_path / "out.mp4", audio_of=str(with_sound))
    with open_source(str(with_sound)) as source:
        process_video(source, Threshold(), sink, overlay=Overlay(CLASSES))
    assert with_sound not in [path.resolve() for path in Path("/proc/self/fd").iterdir()]


def test_sound_that_cannot_be_had_is_told_without_its_password(tmp_path: Path) -> None:
    source = Numbered(3)
    source.name = "http://…@127.0.0.1:9/x"
    with pytest.raises(InputError, match=r"^http://…@127\.0\.0\.1:9/x has no sound"):
        Mp4Sink(tmp_path / "out.mp4", audio_of="http://me:secret@127.0.0.1:9/x").open(source)


def test_the_sound_of_a_live_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is live"):
        Mp4Sink(tmp_path / "out.mp4", audio_of="rtsp://127.0.0.1:9/x").open(Numbered(3, live=True))
    assert list(tmp_path.iterdir()) == []


def test_sound_that_the_container_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("tta", rate=16000)
        container.mux(video.encode(av.VideoFrame.from_ndarray(grey_frames(1)[0], format="bgr24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout="mono")
        frame.rate = 16000
        container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    with open_source(str(path)) as source, pytest.raises(InputError, match=r"\(tta\).*Try .mkv or .mov,"):
        Mp4Sink(tmp_path / "out.mp4", audio_of=str(path)).open(source)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mkv"]
