"""The H.264 sink: what browsers play, at the source's times, whole or not at all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from video_helpers import Numbered, read_back, room_for_files

from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.video.sinks import WindowSink
from aicsd_deploy.video.sources import Frame, Source
from aicsd_deploy.video.video_writer import Mp4Sink, pad_to_even


def write(path: Path, source: Source, *, fail_after: int | None = None, error: BaseException | None = None) -> None:
    with Mp4Sink(path).open(source) as sink:
        for frame in source:
            if frame.index == fail_after:
                raise error or RuntimeError("a stage broke")
            assert sink.write(frame)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_browser_can_play_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write(path, Numbered(30))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.average_rate) == (24, 32, 25)
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
    data = path.read_bytes()
    assert suffix == ".mkv" or 0 < data.index(b"moov") < data.index(b"mdat")
    times, images = read_back(path)
    assert times == pytest.approx([n / 25 for n in range(30)], abs=1e-3)
    np.testing.assert_allclose([image.mean() for image in images], [n * 4 for n in range(30)], atol=3)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("count", [1, 50])
def test_the_video_lasts_as_long_as_its_frames(tmp_path: Path, count: int) -> None:
    write(tmp_path / "out.mp4", Numbered(count))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base == Fraction(count, 25)
        assert stream.frames == count


class Times(Numbered):
    """Frames at given times, in units of the time base."""

    def __init__(self, ticks: list[int], time_base: Fraction) -> None:
        super().__init__(len(ticks))
        self._ticks, self.time_base = ticks, time_base

    def __iter__(self):  # type: ignore[no-untyped-def]
        for frame, ticks in zip(super().__iter__(), self._ticks, strict=True):
            yield Frame(frame.index, frame.image_bgr, float(ticks * self.time_base))


@pytest.mark.parametrize("time_base", [Fraction(1, 12_800), Fraction(1001, 30_000), Fraction(1, 1_000_000)])
def test_variable_frame_times_are_kept_to_the_tick(tmp_path: Path, time_base: Fraction) -> None:
    ticks = [0, 1, 5, 6, 90, 91, 1000, 1003]
    write(tmp_path / "out.mp4", Times(ticks, time_base))
    times, _ = read_back(tmp_path / "out.mp4")
    assert times == pytest.approx([float(t * time_base) for t in ticks], abs=1e-9)


def test_times_that_stand_still_or_go_back_are_mended(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", Times([0, 4, 4, 2, 8], Fraction(1, 100)))
    assert read_back(tmp_path / "out.mp4")[0] == pytest.approx([0, 0.04, 0.05, 0.06, 0.08])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("pause_s", [40_000, 3_000_000, 1_700_000_000])  # as of a clock that is set in the middle
def test_a_pause_that_is_too_long_for_the_file_is_shortened_and_told(
    pause_s: int, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = [40 * n + 1000 * pause_s * ((n >= 8) + (n >= 9)) for n in range(16)]
    write(tmp_path / f"out{suffix}", Times(ticks, Fraction(1, 1000)))
    times, images = read_back(tmp_path / f"out{suffix}")
    steps = np.diff(times)
    assert len(images) == 16
    np.testing.assert_allclose(np.delete(steps, [7, 8]), 0.04, atol=0.002)
    if suffix == ".mkv":
        assert (steps[7:9].tolist(), capsys.readouterr().err) == (pytest.approx([pause_s + 0.04] * 2), "")
    else:
        assert 10_000 < steps[7] < pause_s
        assert 0 < steps[8] < pause_s
        with av.open(str(tmp_path / "out.mp4")) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert max(packet.pts - packet.dts for packet in packets) <= 1 << 28
        assert f"{pause_s + 0.04 - steps[7]:.0f} s of the pause" in capsys.readouterr().err


@pytest.mark.parametrize("size_hw", [(1, 1), (25, 33), (24, 33), (25, 32)])
def test_odd_sizes_gain_one_row_or_column(tmp_path: Path, size_hw: tuple[int, int]) -> None:
    write(tmp_path / "out.mp4", Numbered(3, size_hw=size_hw))
    images = read_back(tmp_path / "out.mp4")[1]
    assert len(images) == 3
    assert images[0].shape[:2] == (size_hw[0] + size_hw[0] % 2, size_hw[1] + size_hw[1] % 2)


def test_padding_repeats_the_edge() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    padded = pad_to_even(image)
    np.testing.assert_array_equal(padded[:3, :5], image)
    np.testing.assert_array_equal(padded[3, :5], image[2])
    np.testing.assert_array_equal(padded[:3, 5], image[:, 4])


def test_colours_survive(tmp_path: Path) -> None:
    class Coloured(Numbered):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for frame in super().__iter__():
                frame.image_bgr[:] = (40, 120, 200)
                yield frame

    write(tmp_path / "out.mp4", Coloured(3))
    np.testing.assert_allclose(read_back(tmp_path / "out.mp4")[1][1], np.full((24, 32, 3), (40, 120, 200)), atol=5)


def test_an_error_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a stage broke"):
        write(tmp_path / "out.mp4", Numbered(5), fail_after=0)
    assert list(tmp_path.iterdir()) == []


def test_a_sink_can_be_opened_again(tmp_path: Path) -> None:
    sink = Mp4Sink(tmp_path / "out.mp4")
    for count in (3, 5):
        with sink.open(Numbered(count)):
            assert all(sink.write(frame) for frame in Numbered(count))
        assert read_back(tmp_path / "out.mp4")[0] == pytest.approx([n / 25 for n in range(count)])


def test_no_frame_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", Numbered(0))
    assert list(tmp_path.iterdir()) == []


def test_an_error_later_keeps_what_there_is_under_another_name_and_the_old_output(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("of an earlier run")
    with pytest.raises(RuntimeError, match="a stage broke"):
        write(tmp_path / "out.mp4", Numbered(20), fail_after=12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "out.partial.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "of an earlier run"
    assert len(read_back(tmp_path / "out.partial.mp4")[0]) == 12


class Noise(Numbered):
    """Frames that take room."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        for frame in super().__iter__():
            frame.image_bgr[:] = np.random.default_rng(frame.index).integers(0, 256, frame.image_bgr.shape)
            yield frame


@pytest.mark.parametrize(
    ("suffix", "room", "kept"),
    [(".mkv", 100_000, ["out.partial.mkv"]), (".mp4", 100_000, []), (".mkv", 0, []), (".mp4", 0, [])],
)
def test_a_full_disk_leaves_what_can_be_played(tmp_path: Path, suffix: str, room: int, kept: list[str]) -> None:
    with room_for_files(room), pytest.raises(OSError, match="too large"):
        write(tmp_path / f"out{suffix}", Noise(100, size_hw=(96, 128)))
    assert [p.name for p in tmp_path.iterdir()] == kept
    assert all(len(read_back(tmp_path / name)[0]) > 3 for name in kept)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_disk_that_fills_up_leaves_room_for_the_end_of_the_file(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 500_000

    def disk_usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=room - sum(path.stat().st_size for path in folder.iterdir()))

    monkeypatch.setattr("aicsd_deploy.video.sinks.shutil.disk_usage", disk_usage)
    with room_for_files(room), pytest.raises(OSError, match=rf"No space left on device: '.*out{suffix}'"):
        write(tmp_path / f"out{suffix}", Noise(1000, size_hw=(96, 128)))
    (partial,) = tmp_path.iterdir()
    assert partial.name == f"out.partial{suffix}"
    assert partial.stat().st_size > room / 4, "it is not given up long before"
    assert len(read_back(partial)[0]) > 3


def test_ctrl_c_keeps_what_there_is_under_its_name(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out.mp4", Numbered(20), fail_after=12, error=KeyboardInterrupt())
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert len(read_back(tmp_path / "out.mp4")[0]) == 12


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "in.mp4", Numbered(3))
    before = (tmp_path / "in.mp4").read_bytes()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "in.mp4")
    source = Numbered(3)
    source.name = str(tmp_path / "in.mp4")
    for name in ("in.mp4", "link.mp4"):
        with pytest.raises(InputError, match="is the input itself"):
            Mp4Sink(tmp_path / name).open(source)
    assert (tmp_path / "in.mp4").read_bytes() == before


def test_the_input_is_not_overwritten_with_what_an_error_leaves(tmp_path: Path) -> None:
    write(tmp_path / "out.partial.mp4", Numbered(3))
    before = (tmp_path / "out.partial.mp4").read_bytes()
    source = Numbered(3)
    source.name = str(tmp_path / "out.partial.mp4")
    with pytest.raises(InputError, match=r"^\S*out\.partial\.mp4, .* is the input itself"):
        Mp4Sink(tmp_path / "out.mp4").open(source)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial.mp4"]
    assert (tmp_path / "out.partial.mp4").read_bytes() == before


@pytest.mark.parametrize("name", ["out.avi", "out", "out.png"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="must end in"):
        Mp4Sink(tmp_path / name)


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a folder"):
        Mp4Sink(tmp_path / "folder.mp4")
    with pytest.raises(InputError, match="Cannot write"):
        Mp4Sink(tmp_path / "file" / "out.mp4").open(Numbered(1))


def test_a_window_without_a_display_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(MissingDependencyError, match="no display"):
        WindowSink()


@pytest.mark.parametrize(
    ("keys", "visible", "shown"), [([-1, ord("q")], 1, 2), ([27], 1, 1), ([-1], 0, 1), ([-1], 1, 6)]
)
def test_a_window_shows_frames_until_it_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, keys: list[int], visible: int, shown: int
) -> None:
    pictures: list[np.ndarray] = []
    pressed = iter([*keys, *[-1] * 9])
    monkeypatch.setenv("DISPLAY", ":0")
    for name in ("namedWindow", "resizeWindow", "destroyAllWindows"):
        monkeypatch.setattr(f"cv2.{name}", lambda *args: None)
    monkeypatch.setattr("cv2.imshow", lambda title, image: pictures.append(image))
    monkeypatch.setattr("cv2.waitKey", lambda wait_ms: next(pressed))
    monkeypatch.setattr("cv2.getWindowProperty", lambda title, what: visible)
    with WindowSink().open(Numbered(6)) as sink:
        for frame in Numbered(6):
            if not sink.write(frame):
                break
    assert len(pictures) == shown


def test_what_a_link_leads_to_is_written_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, real = tmp_path / "out.mp4", tmp_path / "disk/real.mp4"
    link.symlink_to(real)
    source = Numbered(2)
    for error in (None, InputError("broken")):
        sink = Mp4Sink(link).open(source)
        for frame in source:
            sink.write(frame)
        sink.close(error)
        assert link.is_symlink()
        assert real.is_file()
    assert (tmp_path / "disk/real.partial.mp4").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "out.mp4"]
