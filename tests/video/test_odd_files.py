"""Files that cameras, phones and broken downloads leave behind: every frame that can be decoded, or one clear message."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_helpers import CLASSES, Threshold, encode, grey_frames, read_back

from aicsd_deploy.errors import InputError
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.sources import open_source
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
    return encode(path.with_suffix(".mp4"), grey_frames(COUNT), codec="libx265")


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
        video = container.add_stream("libx264", rate=25)
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


@pytest.mark.parametrize(("suffix", "says"), [(".mp4", "has no sound"), (".mkv", "has no sound")])
def test_a_video_without_sound_is_refused_and_nothing_is_left(tmp_path: Path, suffix: str, says: str) -> None:
    path = encode(tmp_path / "in.mp4", grey_frames(3))
    with open_source(str(path)) as source, pytest.raises(InputError, match=says):
        Mp4Sink(tmp_path / f"out{suffix}", audio_of=str(path)).open(source)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


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
    with open_source(str(path)) as source, pytest.raises(InputError, match=r"Write an \.mkv"):
        Mp4Sink(tmp_path / "out.mp4", audio_of=str(path)).open(source)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mkv"]
