"""Live sources: the newest frame only, losses that are survived, ends that are told apart from losses."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from video_helpers import CLASSES, Threshold, encode, grey_frames, within

from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.video.lanes import Lane, Stop
from aicsd_deploy.video.live import Connection, ConnectionLostError, LiveSource, open_camera
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import _fresh, process_video
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.sources import Frame, LoopedSource, Source, SyntheticSource, open_source
from aicsd_deploy.video.streams import GStreamerConnection, interruptible, without_password
from benchmarks.live_soak import READERS, clock_in

SYSTEM_PYTHON = "/usr/bin/python3"  # has GStreamer's bindings, if there are any
pytestmark = pytest.mark.usefixtures("no_threads_left")


class Scripted(Connection):
    """Plays a list: a number is a grey picture, "lost" breaks off, "end" ends."""

    fps = Fraction(30)

    def __init__(self, play: list[object]) -> None:
        self._play = iter(play)
        self.closed = False

    def read(self):  # type: ignore[no-untyped-def]
        item = next(self._play, "lost")
        if item == "lost":
            raise ConnectionLostError("cable pulled")
        return None if item == "end" else np.full((24, 32, 3), item, np.uint8)

    def close(self) -> None:
        self.closed = True


def scripted(*plays: object) -> tuple[Callable[[], Connection], list[Scripted]]:
    """Return a way to connect that plays one list after the other, and the connections that were made."""
    made: list[Scripted] = []
    coming = iter(plays)

    def connect() -> Connection:
        play = next(coming, None)
        if not isinstance(play, list):
            raise InputError("nobody answers")
        made.append(Scripted(play))
        return made[-1]

    return connect, made


def test_a_loss_is_survived_and_the_end_is_not_one(capsys: pytest.CaptureFixture[str]) -> None:
    connect, made = scripted([1, 2, "lost"], "refused", [3, "lost"], [4, "end"])
    with LiveSource("cam", connect) as source:
        frames = list(source)
    assert [int(f.image_bgr[0, 0, 0]) for f in frames] == [1, 2, 3, 4]
    assert [f.index for f in frames] == [0, 1, 2, 3]
    assert (source.reconnects, source.lost) == (2, False)
    assert all(connection.closed for connection in made)
    assert "cable pulled" in capsys.readouterr().err


def test_a_lost_connection_is_let_go_of() -> None:
    """What is opened while its exception is handled would keep it alive: tens of MiB for each loss."""
    handled = []

    class Once(Connection):
        def __init__(self) -> None:
            handled.append(sys.exc_info()[1])
            self.left = 2

        def read(self):  # type: ignore[no-untyped-def]
            self.left -= 1
            if self.left < 0 and len(handled) < 4:
                raise ConnectionLostError("gone")
            return np.zeros((4, 4, 3), np.uint8) if self.left >= 0 else None

    with LiveSource("cam", Once) as source:
        assert len(list(source)) == 8
    assert handled == [None] * 4


def test_damaged_frames_are_counted_once() -> None:
    connect, made = scripted([1, 2, 3, "end"])
    with LiveSource("cam", connect) as source:
        for frame in source:
            made[0].skipped += frame.index  # 0, 1 and 2 of them come to light
    assert source.skipped == 3


def test_damaged_frames_before_a_loss_are_counted() -> None:
    connect, made = scripted([1, "lost"], [2, "end"])
    with LiveSource("cam", connect) as source:
        for frame in source:
            made[0].skipped += 2 * (frame.index == 0)
    assert source.skipped == 2


def test_every_connection_is_closed() -> None:
    connect, made = scripted([1, "lost"], ["end"], ["lost"], [2, "lost"], [3])

    def connect_late() -> Connection:
        if len(made) == 4:
            source.cancel()
        return connect()

    source = LiveSource("cam", connect_late)
    assert len(within(20, lambda: list(source))) == 2
    assert [connection.closed for connection in made] == [True] * 5


def test_a_source_that_does_not_come_back_is_lost() -> None:
    connect, _ = scripted([1, "lost"])
    with LiveSource("cam", connect, patience_s=0.3) as source:
        assert len(list(source)) == 1
    assert source.lost


def test_waiting_for_a_source_can_be_ended() -> None:
    connect, _ = scripted([1, "lost"])
    with LiveSource("cam", connect) as source:
        threading.Timer(0.2, source.cancel).start()
        assert len(within(10, lambda: list(source))) == 1
    assert not source.lost


def test_frames_of_another_size_after_a_loss_are_fitted() -> None:
    class Large(Scripted):
        def read(self):  # type: ignore[no-untyped-def]
            image = super().read()
            return None if image is None else np.full((48, 64, 3), image[0, 0, 0], np.uint8)

    connections = iter([Scripted([1, "lost"]), Large([9, "end"])])
    with LiveSource("cam", lambda: next(connections)) as source:
        assert [f.image_bgr.shape for f in source] == [(24, 32, 3)] * 2


@pytest.mark.parametrize(("play", "says"), [(["lost"], "cable pulled"), (["end"], "before its first picture")])
def test_a_source_without_a_picture_is_an_input_error(play: list[object], says: str) -> None:
    connect, made = scripted(play)
    with pytest.raises(InputError, match=says):
        LiveSource("cam", connect)
    assert made[0].closed


def test_the_age_of_frames_is_counted_and_the_newest_is_shown() -> None:
    class Fast(Connection):
        fps, left = Fraction(100), 60

        def read(self):  # type: ignore[no-untyped-def]
            self.left -= 1
            time.sleep(0.005)
            return np.zeros((24, 32, 3), np.uint8) if self.left else None

    class Slow(Threshold):
        def infer(self, frames_NHWC):  # type: ignore[no-untyped-def]
            time.sleep(0.03)
            return super().infer(frames_NHWC)

    class Keep(Sink):
        name, frames = "keep", []  # type: ignore[var-annotated]

        def write(self, frame: Frame) -> bool:
            self.frames.append(frame.index)
            return True

    with LiveSource("fast", Fast) as source:
        result = process_video(source, Slow(), Keep(), overlay=Overlay(CLASSES))
    assert result.dropped > 20
    assert Keep.frames[-1] == 58  # the last of 59
    assert result.age_ms.size == result.frames_out
    # A queue of more than one frame between any two stages would let ages grow to several inferences.
    assert np.median(result.age_ms) < 100
    assert result.ended == "end"


def test_a_frame_that_has_waited_long_makes_room_for_one_that_is_due() -> None:
    fps = Fraction(1, 10)  # a frame every ten seconds, so that this test's own time does not count
    lane = Lane(Stop(), 9, newest=False)
    now_s = time.perf_counter()
    for index, waited_s in enumerate((1, 6, 0, 7)):
        lane.put(Frame(index, np.zeros((2, 2, 3), np.uint8), 0.0, now_s - waited_s))
    lane.put_end()
    # 0 is fresh; 1 is half a frame time old and 2 is there; 3 is old too, but then comes the end.
    assert [frame.index for frame in within(20, lambda: list(_fresh(lane, fps)))] == [0, 2, 3]


def test_the_age_of_the_first_frame_counts_from_its_arrival() -> None:
    connect, _ = scripted([1, 2, "end"])
    with LiveSource("cam", connect) as source:
        opened_s = time.perf_counter()
        frames = list(source)
    assert frames[0].arrived_s <= opened_s <= frames[1].arrived_s
    assert frames[0].time_s == 0


def test_a_first_frame_that_has_waited_for_the_network_makes_room_too() -> None:
    lane = Lane(Stop(), 9, newest=False)
    now_s = time.perf_counter()
    for index, waited_s in enumerate((25, 0, 12)):
        lane.put(Frame(index, np.zeros((2, 2, 3), np.uint8), 0.0, now_s - waited_s))
    lane.put_end()
    assert [frame.index for frame in within(20, lambda: list(_fresh(lane, Fraction(1, 10))))] == [1, 2]


def test_waiting_for_a_newer_frame_ends_when_all_must_stop() -> None:
    stop = Stop()
    lane = Lane(stop, 9, newest=False)
    threading.Timer(0.3, stop.set).start()
    assert within(5, lambda: lane.newer("this one", within_s=30)) == "this one"


def test_a_lost_source_is_told_in_the_result() -> None:
    class Nothing(Sink):
        name = "nothing"

        def write(self, frame: Frame) -> bool:
            return True

    connect, _ = scripted([1, 2, "lost"])
    with LiveSource("cam", connect, patience_s=0.1) as source:
        result = process_video(source, Threshold(), Nothing(), overlay=Overlay(CLASSES))
    assert (result.ended, result.interrupted) == ("lost", False)


def test_a_camera_through_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    class Camera:
        left = 3

        def __init__(self, index: int) -> None:
            self.index = index

        def isOpened(self) -> bool:
            return self.index == 0

        def read(self):  # type: ignore[no-untyped-def]
            self.left -= 1
            return (True, np.zeros((24, 32, 3), np.uint8)) if self.left >= 0 else (False, None)

        def get(self, what: int) -> float:
            return 29.97

        def set(self, what: int, value: float) -> bool:
            return True

        def release(self) -> None:
            pass

    monkeypatch.setattr("cv2.VideoCapture", Camera)
    with pytest.raises(InputError, match="Camera 1"):
        open_camera(1)
    monkeypatch.setattr("sys.platform", "other")  # where there is no /dev/video0 to look for
    with open_source(None) as source:
        assert source.name == "camera 0"
        frames = iter(source)
        assert [next(frames).index for _ in range(3)] == [0, 1, 2]
        source.cancel()
        assert list(frames) == []


def test_without_a_camera_the_built_in_scene_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("aicsd_deploy.video.sources.Path.exists", lambda path: False)
    source = open_source(None, synthetic_hw=(48, 64), endless=True)
    assert isinstance(source, SyntheticSource)
    assert source.frame_count is None


def test_waiting_for_a_stream_that_does_not_answer_can_be_interrupted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        previous = signal.signal(signal.SIGUSR1, signal.default_int_handler)
        timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        try:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                open_source(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/x")
            assert "opening" in [thread.name for thread in threading.enumerate()], "it is not waited for"
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, previous)


def test_a_source_that_opens_after_the_interrupt_is_closed() -> None:
    go_on, closed = threading.Event(), threading.Event()

    class Late(SyntheticSource):
        def close(self) -> None:
            closed.set()

    def work() -> Source:
        os.kill(os.getpid(), signal.SIGUSR1)
        go_on.wait(20)
        return Late((16, 16))

    previous = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(work)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert not closed.is_set()
    go_on.set()
    assert closed.wait(20)


def test_a_source_can_be_looped(tmp_path: Path) -> None:
    path = encode(tmp_path / "in.mp4", grey_frames(3))
    with open_source(str(path), loop=True) as source:
        frames = [frame for frame, _ in zip(source, range(7), strict=False)]
    assert [f.index for f in frames] == list(range(7))
    assert [f.time_s for f in frames] == pytest.approx([n / 25 for n in range(7)])
    np.testing.assert_array_equal(frames[6].image_bgr, frames[0].image_bgr)


def test_a_looped_file_that_is_replaced_keeps_the_size(tmp_path: Path) -> None:
    with open_source(str(encode(tmp_path / "in.mp4", grey_frames(2))), loop=True) as source:
        frames = iter(source)
        next(frames)
        encode(tmp_path / "new.mp4", grey_frames(2, (96, 64))).replace(tmp_path / "in.mp4")
        assert [next(frames).image_bgr.shape for _ in range(3)] == [(48, 64, 3)] * 3


class Breaking(SyntheticSource):
    """Breaks off after two frames."""

    def __iter__(self) -> Iterator[Frame]:
        yield from [frame for frame, _ in zip(super().__iter__(), range(2), strict=False)]
        self.lost = True


def test_a_looped_source_that_breaks_off_is_lost_and_one_that_is_cancelled_ends() -> None:
    looped = LoopedSource(lambda: Breaking((8, 8)))
    assert [frame.index for frame in looped] == [0, 1]
    assert looped.lost
    looped = LoopedSource(lambda: SyntheticSource((8, 8), seconds=0.1))
    frames = iter(looped)
    assert [next(frames).index for _ in range(3)] == [0, 1, 2]
    looped.cancel()
    assert len(list(frames)) < 3
    assert not looped.lost


def test_passwords_are_not_printed() -> None:
    assert without_password("rtsp://me:secret@cam/1") == "rtsp://…@cam/1"
    assert without_password("rtsp://me:p@ss@cam/1") == "rtsp://…@cam/1"
    assert without_password("rtsp://cam/a@b") == "rtsp://cam/a@b"
    assert without_password("http://cam?mail=a@b") == "http://cam?mail=a@b"


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """A web server with clip.mp4, with /closed and /silent, which break off in a clip, with /live, which does so in motion JPEG,
    and with /garbage, which claims to be that."""
    for name in ("clip.mp4", "clip.ts"):
        encode(tmp_path / name, grey_frames(10))
    noise = np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), np.uint8)
    clip = encode(tmp_path / "clip.mkv", list(noise)).read_bytes()
    encode(tmp_path / "index_last.mp4", list(noise))
    ended = threading.Event()
    jpeg = encode(tmp_path / "one.mjpeg", grey_frames(1), codec="mjpeg", pix_fmt="yuvj420p").read_bytes()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if self.path in ("/closed", "/silent"):
                self.send_response(200)
                self.send_header("Content-Length", str(len(clip)))
                self.end_headers()
                self.wfile.write(clip[: len(clip) // 2])
                ended.wait(30 if self.path == "/silent" else 0)
                return None
            if self.path == "/segments.m3u8":  # without its size, and with no #EXT-X-ENDLIST: more may come
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"#EXTM3U\n#EXT-X-TARGETDURATION:8\n#EXTINF:8,\nsegment.ts\n")
                return None
            if self.path not in ("/live", "/garbage"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=x")
            self.end_headers()
            for picture in [jpeg] * 8 if self.path == "/live" else [bytes(500)] * 2000:
                part = b"--x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture)
                self.wfile.write(part + picture + b"\r\n")
                time.sleep(0.01)
            return None

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:  # who has read enough hangs up
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        ended.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts"])  # with a duration in front; with none but at its end
def test_a_file_on_a_web_server_is_read_like_a_file(name: str, web_server: str) -> None:
    with open_source(f"{web_server}/{name}") as source:
        assert not source.live
        assert [f.index for f in source] == list(range(10))
        assert not source.lost


def test_what_comes_in_segments_is_read_frame_by_frame(web_server: str, tmp_path: Path) -> None:
    encode(tmp_path / "segment.ts", grey_frames(1) * 200)  # FFmpeg looks at five seconds of what has no end
    with within(20, lambda: open_source(f"{web_server}/segments.m3u8")) as source:
        assert not source.live
        assert [f.index for f, _ in zip(source, range(10), strict=False)] == list(range(10))


def test_segments_that_no_longer_come_are_lost(
    web_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicsd_deploy.video.video_file.SERVER_TIMEOUT_S", 1.0)
    playlist = encode(tmp_path / "live.m3u8", grey_frames(50) * 2, options={"g": "25"})
    playlist.write_text(playlist.read_text().replace("#EXT-X-ENDLIST", ""))
    with within(20, lambda: open_source(f"{web_server}/live.m3u8")) as source:
        assert len(within(20, lambda: list(source))) == 100
        assert (source.lost, source.skipped) == (True, 0)


def test_a_file_whose_index_is_out_of_reach_is_refused_with_what_to_do(web_server: str) -> None:
    with pytest.raises(InputError, match=r"no byte ranges.*faststart"):
        open_source(f"{web_server}/index_last.mp4")


@pytest.mark.parametrize("path", ["closed", "silent"])
def test_a_file_on_a_web_server_that_is_gone_is_lost(
    path: str, web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicsd_deploy.video.video_file.SERVER_TIMEOUT_S", 0.5)
    with open_source(f"{web_server}/{path}") as source:
        frames = within(20, lambda: list(source))
        assert not source.live
        assert (source.lost, source.skipped) == (True, 0)
    assert 10 < len(frames) < 100


def test_a_live_http_stream_is_reconnected_when_it_breaks_off(web_server: str) -> None:
    def read() -> list[Frame]:
        with open_source(f"{web_server}/live") as source:
            assert source.live
            frames = [frame for frame, _ in zip(source, range(12), strict=False)]
            assert source.reconnects == 1
            return frames

    frames = within(30, read)
    assert [f.index for f in frames] == list(range(12))
    assert frames[11].image_bgr.mean() == pytest.approx(20, abs=3)


def test_a_stream_of_which_nothing_can_be_decoded_is_not_waited_for_forever(
    web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicsd_deploy.video.streams.UNDECODABLE_S", 0.5)
    with pytest.raises(InputError, match=r"gives no picture: .* could be decoded"):
        within(15, lambda: open_source(f"{web_server}/garbage"))


def test_a_server_that_answers_once_is_read(tmp_path: Path) -> None:
    clip = encode(tmp_path / "clip.ts", [*np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), np.uint8)])

    def answer(server: socket.socket) -> None:
        with server, server.accept()[0] as client:
            server.close()
            with suppress(OSError):  # who has read enough hangs up
                client.sendall(20 * clip.read_bytes())  # finding out what it is takes some of it

    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=answer, args=(server,))
    thread.start()
    with within(20, lambda: open_source(f"tcp://127.0.0.1:{server.getsockname()[1]}")) as source:
        frames = [frame for frame, _ in zip(source, range(50), strict=False)]
    thread.join(20)
    assert (len(frames), source.live, source.reconnects) == (50, True, 0)


def test_an_address_where_nothing_is_is_an_input_error(web_server: str) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        open_source(f"{web_server}/missing.mp4")


def test_text_on_a_web_server_is_no_live_video(web_server: str, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("hello\n" * 99)
    with pytest.raises(InputError, match="no video in it"):
        open_source(f"{web_server}/page.txt")


has_gstreamer = pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="needs GStreamer (gst-launch-1.0)")


@has_gstreamer
@pytest.mark.parametrize("sink", ["", " ! appsink drop=true max-buffers=1", "!appsink"])
def test_a_gstreamer_pipeline(sink: str) -> None:
    pipeline = (
        f"videotestsrc is-live=true num-buffers=20 pattern=red ! video/x-raw,width=64,height=48,framerate=30/1{sink}"
    )
    with open_source(pipeline) as source:
        frames = within(20, lambda: list(source))
    assert 1 <= len(frames) <= 20
    np.testing.assert_allclose(frames[0].image_bgr[24, 32], (0, 0, 255), atol=12)
    assert (source.live, source.lost, source.size_hw) == (True, False, (48, 64))


@has_gstreamer
@pytest.mark.parametrize("size_hw", [(75, 102), (33, 101), (360, 484)])
def test_a_gstreamer_pipeline_of_odd_sizes(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    caps = f"video/x-raw,format=I420,width={width},height={height},framerate=30/1"  # whose rows GStreamer pads
    with open_source(f"videotestsrc is-live=true num-buffers=45 pattern=white ! {caps}") as source:
        frames = within(20, lambda: list(source))
    assert source.size_hw == (height, width // 2 * 2)
    assert len(frames) > 1
    assert min(frame.image_bgr.min() for frame in frames) > 240


@has_gstreamer
def test_a_gstreamer_pipeline_that_falls_silent_is_lost() -> None:
    connection = GStreamerConnection("videotestsrc is-live=true ! video/x-raw,width=64,height=48")
    try:
        assert connection.read() is not None
        connection._launched._process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConnectionLostError):
            within(20, lambda: [connection.read() for _ in range(100)])
    finally:
        connection.close()


@pytest.fixture
def clip_pipeline(tmp_path: Path) -> str:
    """A pipeline that reads 40 frames from a file."""
    path = encode(tmp_path / "clip.avi", grey_frames(40), codec="mjpeg", pix_fmt="yuvj420p")
    return f"filesrc location={path} ! avidemux ! jpegdec"


@has_gstreamer
def test_a_gstreamer_pipeline_that_reads_a_file_gives_every_frame(clip_pipeline: str) -> None:
    with open_source(clip_pipeline) as source:
        time.sleep(0.5)  # the pipeline waits
        frames = within(20, lambda: list(source))
    assert (source.live, source.lost, source.size_hw) == (False, False, (48, 64))
    assert [f.time_s for f in frames] == pytest.approx([n / 25 for n in range(40)], abs=1e-3)
    np.testing.assert_allclose([f.image_bgr.mean() for f in frames], [i.mean() for i in grey_frames(40)], atol=5)


@has_gstreamer
def test_a_gstreamer_pipeline_that_reads_a_file_and_breaks_is_lost(clip_pipeline: str) -> None:
    with open_source(f"{clip_pipeline} ! identity error-after=20") as source:
        frames = within(20, lambda: list(source))
    assert source.lost
    assert 10 < len(frames) < 30


@has_gstreamer
def test_a_gstreamer_pipeline_that_is_cancelled_has_not_broken(
    clip_pipeline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_source(f"{clip_pipeline} ! identity sleep-time=200000") as source:
        for _ in source:
            source.cancel()
    assert not source.lost
    assert capsys.readouterr().err == ""


@has_gstreamer
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for the process as Linux shows it")
def test_a_gstreamer_pipeline_does_not_outlive_the_process_that_left_it() -> None:
    code = """
import subprocess, threading
from aicsd_deploy.video import streams
started, popen = threading.Event(), subprocess.Popen
def watched(*args, **kwargs):
    process = popen(*args, **kwargs)
    print(process.pid, flush=True)
    started.set()
    return process
subprocess.Popen = watched
silent = "videotestsrc is-live=true ! valve drop=true"
threading.Thread(target=streams.GStreamerConnection, args=(silent,), daemon=True).start()
started.wait(30)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=True)
    process = Path(f"/proc/{int(done.stdout)}/cmdline")

    def gone() -> bool:
        return not process.exists() or process.read_bytes() == b""  # as of one that nobody has asked for its exit code

    within(20, lambda: [time.sleep(0.05) for _ in iter(gone, True)])


@has_gstreamer
def test_a_gstreamer_pipeline_that_is_wrong_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"nosuchsrc.*without a sink"):
        open_source("nosuchsrc ! videoconvert")
    with pytest.raises(InputError, match="No closing quotation"):
        open_source("videotestsrc pattern='ball ! videoconvert")


@has_gstreamer
def test_a_gstreamer_pipeline_that_gives_nothing_is_not_told_to_be_an_address() -> None:
    for pipeline in ("videotestsrc num-buffers=0 ! videoconvert", "filesrc location=/dev/null"):
        with pytest.raises(InputError, match=r"gives no video: it ended, .*without a sink") as told:
            within(20, lambda pipeline=pipeline: open_source(pipeline))
        assert "server" not in str(told.value)


@has_gstreamer
def test_a_source_element_alone_is_a_pipeline() -> None:
    with open_source("videotestsrc is-live=true num-buffers=9") as source:
        assert within(20, lambda: list(source))


def test_a_gstreamer_pipeline_without_gstreamer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match=r"gstreamer1\.0-tools"):
        open_source("videotestsrc ! videoconvert")


SERVER = [SYSTEM_PYTHON, str(Path(__file__).parents[2] / "tools" / "rtsp_server.py"), "--fps", "25", "--port"]


def has_rtsp_server() -> bool:
    bindings = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    return Path(SYSTEM_PYTHON).exists() and subprocess.run([SYSTEM_PYTHON, "-c", bindings], check=False).returncode == 0


def start_server(port: int) -> subprocess.Popen[str]:
    process = subprocess.Popen([*SERVER, str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "rtsp://" in process.stdout.readline()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_an_rtsp_server_that_is_killed_and_started_again(reader: str) -> None:
    if not has_rtsp_server():
        pytest.skip("needs GStreamer's RTSP server and its bindings; tools/rtsp_server.py says which packages")
    if reader == "gstreamer" and subprocess.run(["gst-inspect-1.0", "--exists", "avdec_h264"], check=False).returncode:
        pytest.skip("needs GStreamer's avdec_h264 (on Debian: apt install gstreamer1.0-libav)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start_server(port)
    try:
        with open_source(READERS[reader].format(f"rtsp://127.0.0.1:{port}/live")) as source:
            frames = iter(source)
            seen = [next(frames) for _ in range(5)]
            server.kill()
            server.wait()
            server = start_server(port)
            seen += [within(30, lambda: next(frames)) for _ in range(5)]
            assert source.reconnects == 1
    finally:
        server.kill()
        server.wait()
    assert (source.live, source.size_hw) == (True, (360, 480))
    assert [f.index for f in seen] == list(range(10))
    # The pictures carry the moment at which they were made; a backlog from before the connection would show.
    age_ms = (time.monotonic() * 1000 - clock_in(seen[-1].image_bgr)) % 2**32
    assert age_ms < 5000
