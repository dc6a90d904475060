"""The way latency is measured: turns, warm-up, intervals, and words for noise."""

from __future__ import annotations

import os

import numpy as np
import pytest

from aicsd_deploy.bench import latency as module
from aicsd_deploy.bench import machine_load
from aicsd_deploy.bench.latency import Latency, measure_latency, median_interval, prepare_frames, ratio_interval
from aicsd_deploy.bench.machine_load import MachineLoad, watch_machine
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.runtime.base import Backend

FRAMES = [np.full((8, 8, 3), i, np.uint8) for i in range(3)]


class Clock:
    """Stands in for `time.perf_counter`: it goes on only when a backend works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake(Backend):
    """Takes a frame's time on the fake clock, and notes who was called."""

    def __init__(self, name: str, clock: Clock, milliseconds: list[float], calls: list[str]) -> None:
        self.metadata = Metadata("m", (SegClass("a", (0, 0, 0)),), (8, 8))
        self.name, self.device = name, "cpu"
        self._clock, self._times, self._calls = clock, milliseconds, calls

    def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
        self._clock.now += self._times[min(self._calls.count(self.name), len(self._times) - 1)] / 1000
        self._calls.append(self.name)
        return frames_NHWC[..., 0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_artefacts_take_turns_and_every_one_is_timed(clock: Clock) -> None:
    calls: list[str] = []
    backends = [Fake("a", clock, [2.0], calls), Fake("b", clock, [4.0], calls)]
    found = measure_latency(backends, FRAMES, rounds=4, per_round=3)
    assert [latency.p50_ms for latency in found] == pytest.approx([2, 4])
    assert [latency.frames for latency in found] == [12, 12]
    assert found[0].fps == pytest.approx(500)
    turns = "".join(calls[found[0].warmup_frames + found[1].warmup_frames :])
    assert turns == "aaaabbbb" + "bbbbaaaa" + "aaaabbbb" + "bbbbaaaa", (
        "one more before each turn, and another one starts"
    )


def test_warm_up_lasts_until_times_are_stable_and_says_so_if_they_never_are(clock: Clock) -> None:
    settling = Fake("a", clock, [100.0] * 5 + [50.0] * 5 + [10.0], [])
    found = measure_latency([settling], FRAMES, rounds=2)[0]
    assert found.warmup_frames == 20
    assert found.p99_ms == pytest.approx(10)
    assert found.noise == ()
    growing = Fake("b", clock, [1.1**i for i in range(200)], [])
    found = measure_latency([growing], FRAMES, rounds=2)[0]
    assert found.warmup_frames == module.WARMUP_MAX
    assert "still changing" in found.noise[0]


def test_percentiles_are_those_of_all_frames() -> None:
    latency = Latency.of([[float(ms) for ms in range(101)]])
    assert (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms) == pytest.approx((50, 90, 95, 99))


def test_frames_come_at_the_size_and_in_the_channel_order_of_the_artefact() -> None:
    backend = Fake("a", Clock(), [1.0], [])
    blue = np.zeros((16, 16, 3), np.uint8)
    blue[..., 0] = 200
    for order, pixel in (("bgr", [200, 0, 0]), ("rgb", [0, 0, 200])):
        backend.metadata = backend.metadata.replace(channel_order=order)
        (prepared,) = prepare_frames(backend, [blue])
        assert prepared.shape == (1, 8, 8, 3)
        assert prepared[0, 0, 0].tolist() == pixel


def test_no_outlier_is_dropped() -> None:
    latency = Latency.of([[1.0] * 49, [1.0] * 49, [1.0, 900.0] + [1.0] * 47])
    assert max(latency.times_ms) == 900
    assert latency.mean_ms > 6
    assert any("scatter" in text for text in latency.noise)


def test_the_interval_holds_the_median_of_a_repeat_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)

    def run_ms() -> np.ndarray:
        return 10 + rng.normal(0, 0.3, (20, 1)) + rng.normal(0, 0.1, (20, 5))  # frames of one round are alike

    hits, width = 0, 0.0
    for _ in range(200):
        low, high = median_interval(run_ms(), resamples=300)
        hits += low <= np.median(run_ms()) <= high
        width += (high - low) / 200
    assert hits >= 185, hits
    assert width < 0.7, "and is not just wide: 0.3 is the scatter of single rounds"


def test_one_round_has_no_interval_and_says_so() -> None:
    assert "no interval" in Latency.of([[1.0, 2.0, 3.0]]).noise[0]


def test_a_median_that_a_repeat_could_move_is_said_to_be_uncertain() -> None:
    (text,) = Latency.of([[10.0] * 5] * 5 + [[13.0] * 5] * 5).noise
    assert text.startswith("the median is uncertain by")
    assert Latency.of([[10.0] * 5] * 5 + [[10.1] * 5] * 5).noise == ()


def test_an_interval_of_few_rounds_stays_above_nothing() -> None:
    assert 0 < Latency.of([[1.0] * 5, [10.0] * 5]).p50_interval_ms[0] < 1
    assert 0 < ratio_interval([[1.0] * 5, [10.0] * 5], [[1.0] * 5, [1.0] * 5])[0] < 1


def test_a_machine_at_work_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tick, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1
    counters = {
        "_jiffies": [(7.0 * tick, 1.0 * tick), (17.0 * tick, 3.0 * tick)],
        "_own_seconds": [5.0, 9.0],
    }
    for name, values in counters.items():
        monkeypatch.setattr(machine_load, name, iter(values).__next__)
    monkeypatch.setattr(machine_load.time, "monotonic", iter([100.0, 104.0]).__next__)
    with watch_machine() as load:
        pass
    assert load.others_cores == 1.5, "10 seconds of work in 4, of which 4 were this process's"
    assert load.stolen_share == pytest.approx(2 / 4 / cores, abs=1e-4)
    assert MachineLoad(others_cores=1.5, stolen_share=0.2).noise() == [
        "other processes kept 1.5 cores busy",
        "the hypervisor took 20 % of the time",
    ]
    assert MachineLoad(others_cores=0.01, stolen_share=0.0).noise() == []


def test_the_ratio_of_two_is_certain_where_the_machine_drifts() -> None:
    drift = np.linspace(1, 1.5, 20)[:, None]
    jitter = np.random.default_rng(0).normal(1, 0.002, (20, 5))
    slow, fast = 10 * drift * jitter, 6 * drift
    low, high = ratio_interval(fast, slow)
    assert low < 0.6 < high
    assert high - low < 0.007
    assert np.diff(median_interval(slow)) > 1, "while the median itself is not"
