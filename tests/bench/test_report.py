"""report.json, report.md, report.html and MODEL_CARD.md say the same, and hold what was measured."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, REPO, call_script, random_checkpoint
from torch import nn

from aicsd_deploy.bench import charts, tables, throughput
from aicsd_deploy.bench import report as report_module
from aicsd_deploy.bench.accuracy import score_together
from aicsd_deploy.bench.footprint import count_work
from aicsd_deploy.bench.gpu_meter import GpuMeter
from aicsd_deploy.bench.latency import Stopwatch
from aicsd_deploy.bench.peak import Peak, measure_peak
from aicsd_deploy.bench.pictures import LOST_BGR, OTHER_BGR, WON_BGR, draw_difference
from aicsd_deploy.bench.report_files import to_markdown, to_model_card, write_report
from aicsd_deploy.bench.report_html import headline, to_html
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError
from aicsd_deploy.export.onnx_export import export_onnx
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.runtime.base import Backend, open_backend

TEACHER, CHECKPOINT, ONNX = "runs/teacher/best.pt", "runs/student/best.pt", "runs/student/student.onnx"


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    arguments = [TEACHER, ONNX, "--rounds", 3, "--out", folder, "--reference", ONNX]
    result = call_script("demo/benchmark.py", *arguments, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert "MODEL_CARD.md (of student.onnx)\n" in result.stderr
    return folder


@pytest.fixture(scope="module")
def report(made: Path) -> dict[str, Any]:
    return json.loads((made / "report.json").read_text())  # type: ignore[no-any-return]


class Page(HTMLParser):
    """Collects the tables, the addresses and the pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None


def assert_same_numbers(folder: Path) -> None:
    """The tables in report.html and report.md are those of report.json, cell by cell."""
    report = json.loads((folder / "report.json").read_text())
    page, markdown = Page((folder / "report.html").read_text()), (folder / "report.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    for table in (tables.summary, tables.latency, tables.stages, tables.costs, tables.classes):
        headers, rows = table(report)
        assert [headers, *rows] in page.tables, table.__name__
        assert all(row in lines for row in [headers, *rows]), table.__name__


PUBLISHED = sorted(path.parent for path in (REPO / "docs/results").glob("*/report.json"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_reports_agree_with_their_json(folder: Path) -> None:
    assert_same_numbers(folder)
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_all_files_show_the_numbers_of_the_json(made: Path, report: dict[str, Any]) -> None:
    assert_same_numbers(made)
    markdown, card = (made / "report.md").read_text(), (made / "MODEL_CARD.md").read_text()
    for row in report["artifacts"]:  # the tables themselves, held against the JSON
        assert f"{100 * row['miou']:.2f}" in markdown
        for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms"):
            assert f"{row[key]:.2f}" in markdown
        for iou in row["per_class_iou"].values():
            assert f"{100 * iou:.2f}" in markdown
    last = report["artifacts"][-1]
    assert f"{last['p50_ms']:.2f}" in card
    assert f"{100 * last['miou']:.2f}" in card


def test_the_page_needs_no_network_and_holds_every_part(made: Path, trained: Path, report: dict[str, Any]) -> None:
    text = (made / "report.html").read_text()
    page = Page(text)
    assert not [a for a in page.addresses if not a.startswith("data:image/jpeg;base64,")]
    assert not re.search(r"https?://|@import|<script", text)
    assert len(page.addresses) == 2 * 4, "two frames of one artefact, in four panels each"
    assert text.count("<svg viewBox") >= 3 + 1
    assert report["provenance"]["command"] in text.replace("&gt;", ">")
    assert "prefers-color-scheme: dark" in text
    with open_backend(trained / ONNX, device="cpu") as backend:
        classes = backend.metadata.classes
    for seg_class in classes:
        color = ",".join(map(str, seg_class.color_rgb))
        assert f'background:rgb({color})"></i>{seg_class.name}</span>' in text, "the legend of the frames"


def test_the_json_is_complete(report: dict[str, Any]) -> None:
    assert report["schema_version"] == 3
    assert report["peak"]["cpu"]["gflops"] > 0
    assert report["reference"] == 1
    for row in report["artifacts"]:
        low, high = row["p50_interval_ms"]
        assert low <= row["p50_ms"] <= high
        assert row["p50_ratio"] == row["p50_ms"] / report["artifacts"][1]["p50_ms"]
        assert row["p50_ratio_interval"][0] <= row["p50_ratio"] <= row["p50_ratio_interval"][1]
        assert row["p50_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert len(row["times_ms"]) == row["frames"] == 15
        assert np.median(row["times_ms"]) == pytest.approx(row["p50_ms"], abs=1e-3)
        assert set(row["stages_ms"]) == {"preprocessing", "network", "postprocessing"}
        assert row["throughput"]["best_fps"] == max(row["throughput"]["fps_by_batch"].values())
        assert row["memory_mb"] > 20
        assert row["start_s"] > 0
        assert row["gflops"] > 0
        assert row["compute_share"] > 0
    assert report["artifacts"][1]["p50_ratio_interval"] == [1, 1], "with itself"
    agreements = [row["agreement"] for row in report["artifacts"]]
    assert agreements[1] == 1.0, "with itself"
    assert 0.5 < agreements[0] < 1.0


def test_rounds_of_timing_are_spread_over_the_scoring(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    dataset, order = open_dataset("folder:data", "val"), list[str]()
    load, run_round = dataset.load, Stopwatch.run_round
    monkeypatch.setattr(dataset, "load", lambda index: order.append("image") or load(index))
    monkeypatch.setattr(Stopwatch, "run_round", lambda self: order.append("round") or run_round(self))
    report_module.benchmark([Path(ONNX)], dataset, device="cpu", threads=1, rounds=2 * len(dataset), pictures=False)
    assert " ".join(order).count("image round round") == len(dataset)


def test_work_is_counted_alike_in_both_kinds_of_file(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AICSD_TRUST", "tiny_network:tiny")
    monkeypatch.chdir(trained)
    checkpoint, onnx = (count_work(trained / path) for path in (CHECKPOINT, ONNX))
    # tiny_network at 48x64: 16 filters of 5x5x3 at 12x16, 3 filters of 1x1x16
    expected = 2 * 12 * 16 * (16 * 75 + 3 * 16)
    assert checkpoint.gflops == onnx.gflops == pytest.approx(expected / 1e9)
    assert onnx.parameters == 16 * 75 + 16 + 3 * 16 + 3
    assert checkpoint.parameters == onnx.parameters + 2 * 16, "batch normalisation is folded into the exported file"


class Mixed(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3, 4, 1))
        self.gate, self.attention = nn.Linear(16, 48), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.last = nn.ConvTranspose2d(48, 24, 2, 2, groups=2), nn.Conv2d(24, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.first(images)
        batch, _, height, width = features.shape
        tokens = features.flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        gate = self.gate(tokens.mean(dim=1)).sigmoid()[..., None, None]
        grown = tokens.transpose(1, 2).reshape(batch, 16, height, width).repeat(1, 3, 1, 1)
        return self.last(self.up(grown * gate))


def test_work_of_other_layers_is_counted_alike_too(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", "test_report:Mixed", (48, 64))
    export_onnx(checkpoint.build(), checkpoint.metadata, tmp_path / "c.onnx")
    found = [count_work(tmp_path / name) for name in ("c.pt", "c.onnx")]
    pixels = 12 * 16
    attention = pixels * 16 * 4 * 16 + 2 * pixels * pixels * 16
    products = pixels * 27 * 16 + attention + 16 * 48 + pixels * 48 * 12 * 4 + 4 * pixels * 24 * len(CLASSES)
    assert [work.gflops for work in found] == [pytest.approx(2 * products / 1e9)] * 2
    export_onnx(checkpoint.build(), checkpoint.metadata.replace(dynamic=("size",)), tmp_path / "any.onnx")
    open_ended = count_work(tmp_path / "any.onnx")
    assert open_ended.gflops in (None, found[0].gflops), "sizes that a graph computes are not taken for nothing"
    assert open_ended.parameters == found[1].parameters


def test_a_worse_artefact_fails_the_gate_and_the_report_is_written(made: Path, trained: Path, tmp_path: Path) -> None:
    baseline = json.loads((made / "report.json").read_text())
    command = ["demo/benchmark.py", ONNX, "--rounds", 1, "--no-pictures", "--out", tmp_path / "new"]
    fine = ["--fail-if", "miou<-0.005"]
    result = call_script(*command, "--baseline", made / "report.json", *fine, cwd=trained)
    assert result.returncode == 0, result.stderr
    for row in baseline["artifacts"]:
        row["miou"] += 0.02
    (tmp_path / "better.json").write_text(json.dumps(baseline))
    result = call_script(*command, "--baseline", tmp_path / "better.json", *fine, cwd=trained)
    assert result.returncode == 3
    assert "Worse than the baseline" in result.stderr
    assert (tmp_path / "new/report.html").is_file()


def test_a_baseline_is_neither_overwritten_nor_half_compared(made: Path, trained: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "report.json"
    baseline.write_bytes((made / "report.json").read_bytes())
    gate = ["--rounds", 1, "--no-pictures", "--baseline", baseline, "--fail-if", "miou<-0.005"]
    result = call_script("demo/benchmark.py", ONNX, *gate, "--out", tmp_path / "x/..", cwd=trained)
    assert result.returncode == 2
    assert "over the baseline" in result.stderr
    result = call_script("demo/benchmark.py", TEACHER, CHECKPOINT, *gate, "--out", tmp_path / "new", cwd=trained)
    assert result.returncode == 2
    named = "must have one student/best.pt to compare with: it has runs/teacher/best.pt, runs/student/student.onnx"
    assert named in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "said before anything is measured"
    assert baseline.read_bytes() == (made / "report.json").read_bytes()


class Growing(Backend):
    """Takes batches up to `most`, and is the faster per frame the larger they are."""

    metadata = Metadata("m", CLASSES, (8, 8), dynamic=("batch",))
    name, device = "growing", "cpu"

    def __init__(self, most: int) -> None:
        self.most, self.now_s = most, 0.0

    def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
        if len(frames_NHWC) > self.most:
            raise InputError("CUDA out of memory")
        self.now_s += 0.02
        return frames_NHWC[..., 0]


def test_frames_per_second_count_every_frame_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Growing(most=2)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: backend.now_s)
    found = throughput.measure_throughput(backend, [np.zeros((1, 8, 8, 3), np.uint8)])
    assert found.fps_by_batch == pytest.approx({1: 50, 2: 100})
    assert (found.best_batch, found.best_fps) == (2, pytest.approx(100))


class Painting(Backend):
    """Labels every pixel as its blue value says, but those of the frames whose red value is in `wrong`."""

    metadata = Metadata("m", CLASSES[:2], (4, 4))
    name, device = "painting", "cpu"

    def __init__(self, *wrong: int) -> None:
        self._wrong = wrong

    def infer(self, frames_NHWC: np.ndarray) -> np.ndarray:
        red = int(frames_NHWC[0, 0, 0, 2])
        labels = frames_NHWC[..., 0].copy()
        labels[0, : self._wrong.count(red)] ^= 1  # a row for each time that it is named
        return labels


class Numbers(SegmentationDataset):
    """Frames whose red value is their number, and that are class 0 all over."""

    classes, spec, split = CLASSES[:2], "numbers", "val"

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, labels = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
        image[..., 0] = index  # red
        return image, labels


def test_the_frames_shown_are_the_worst_and_a_typical_one() -> None:
    reference, other = score_together([Painting(0, 0), Painting(1, 1, 2)], Numbers(), reference=0)
    assert (reference.worst_frame, reference.agreement) == (0, 1)
    assert (other.worst_frame, other.typical_frame) == (1, 2), "of 0, 1, 2 it loses -2, 2 and 1 rows"
    assert other.agreement == pytest.approx(1 - 5 / 12)


def test_the_headline_says_what_is_lost_where_the_mean_gains() -> None:
    rows: list[dict[str, Any]] = [
        {"path": "t.pt", "p50_ms": 20, "miou": 0.5, "per_class_iou": {"a": 0.6, "b": 0.4, "c": None}},
        {"path": "s.pt", "p50_ms": 10, "miou": 0.52, "per_class_iou": {"a": 0.7, "b": 0.34, "c": None}},
        {"path": "q.pt", "p50_ms": 10, "miou": 0.33, "per_class_iou": {"a": 0.6, "b": 0.4, "c": 0.0}},
        {"path": "o.pt", "p50_ms": 10, "miou": 0.50004, "per_class_iou": {"a": 0.6, "b": 0.4, "c": None}},
    ]
    rows = [row | {"p50_ratio_interval": [0.4, 0.625]} for row in rows]
    student, quantised, exported = headline({"artifacts": rows, "reference": 0})
    assert student.endswith(
        "2.00 times (1.60 to 2.50) as fast as t.pt, and gains 2.00 points of mIoU. It loses most in b."
    )
    assert quantised.endswith(
        "loses 17.00 points of mIoU. Only one of the two predicts c, which no label has: that alone moves mIoU."
    )
    assert exported.endswith("as fast as t.pt, and has the same mIoU.")


def test_the_model_card_tells_weak_classes_from_those_without_a_label(report: dict[str, Any]) -> None:
    known = {"good": 0.5, "weak": 0.29, "only predicted": 0.0, "nowhere": None}
    pixels = {"good": 9, "weak": 9, "only predicted": 0, "nowhere": 0}
    rows = [row | {"per_class_iou": known, "label_pixels": pixels} for row in report["artifacts"]]
    card = to_model_card(report | {"artifacts": rows})
    assert "Do not rely on weak: below 30 % IoU." in card
    assert "Nothing is known about only predicted, nowhere:" in card


def test_what_the_load_generator_found_is_shown_with_how_long_it_ran(report: dict[str, Any]) -> None:
    assert "load generator" not in to_markdown(report)
    assert "load generator" not in to_html(report, [])
    found = {
        "seconds": 7,
        "single_stream_ms": None,
        "single_stream_p90_ms": 1.5,
        "single_stream_valid": True,
        "offline_fps": 9.5,
    }
    rows = [row | {"loadgen": found | {"offline_valid": False}} for row in report["artifacts"]]
    for text in (to_markdown(report | {"artifacts": rows}), to_html(report | {"artifacts": rows}, [])):
        assert "At least 7 s for each scenario" in text


def test_a_batch_that_does_not_fit_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 0)
    frame = np.zeros((1, 8, 8, 3), np.uint8)
    found = throughput.measure_throughput(Growing(most=1), [frame])
    assert list(found.fps_by_batch) == [1]
    with pytest.raises(InputError, match="out of memory"):
        throughput.measure_throughput(Growing(most=0), [frame])


def test_each_device_has_a_peak_of_its_own(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_two_devices(path: Path, **how: Any) -> Backend:
        backend = open_backend(path, **how)
        backend.device = "cuda:0" if path.suffix == ".pt" else "cpu"
        return backend

    monkeypatch.setenv("AICSD_TRUST", "tiny_network:tiny")
    monkeypatch.chdir(trained)
    monkeypatch.setattr(report_module, "open_backend", on_two_devices)
    monkeypatch.setattr(report_module, "measure_peak", {"cpu": Peak(4, 2), "cuda:0": None}.get)
    paths = [trained / CHECKPOINT, trained / ONNX]
    how: dict[str, Any] = {"device": "cpu", "threads": 1, "rounds": 1, "pictures": False}
    found, _ = report_module.benchmark(paths, open_dataset("folder:data", "val"), **how)
    checkpoint, onnx = found["artifacts"]
    assert checkpoint["compute_share"] is checkpoint["bandwidth_share"] is None
    assert onnx["compute_share"] == onnx["gflops"] / (onnx["p50_ms"] / 1000) / 4
    assert onnx["bandwidth_share"] == onnx["traffic_mb"] / 1e3 / (onnx["p50_ms"] / 1000) / 2
    rows = dict(tables.machine(found)[1])
    assert rows["measured peak, cpu"] == "4.0 GFLOP/s in float32, 2.0 GB/s"
    assert "unknown" in rows["measured peak, cuda:0"]


def test_no_peak_where_pytorch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert measure_peak("cuda:0") is None


def test_losers_come_first() -> None:
    before = {"per_class_iou": {"a": 0.5, "b": 0.9, "c": None, "d": 0.2}}
    now = {"per_class_iou": {"a": 0.6, "b": 0.7, "c": 0.1, "d": 0.19}}
    assert tables.losers_first(now, before) == ["b", "d", "a", "c"]


def test_the_difference_shows_who_is_right() -> None:
    frame = np.full((1, 4, 3), 90, np.uint8)
    labels, before, now = (np.array([row], np.uint8) for row in ([0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 2]))
    drawn = draw_difference(frame, labels, before, now)
    assert drawn[0].tolist() == [[158] * 3, list(LOST_BGR), list(WON_BGR), list(OTHER_BGR)]


def test_the_pareto_front_leaves_out_what_is_beaten_in_both() -> None:
    drawing = charts.pareto(["slow", "fast", "bad"], [40, 10, 20], [(39, 41), (9, 11), (19, 21)], [0.7, 0.6, 0.5])
    (points,) = re.findall(r'<polyline points="([^"]*)"', drawing)
    assert len(points.split()) == 2


def test_the_scale_of_the_pareto_plot_begins_with_its_own_zero() -> None:
    drawing = charts.pareto(["teacher", "collapsed"], [20, 10], [(19, 21), (9, 11)], [0.12, 0.001])
    assert re.findall(r'text-anchor="end"[^>]*>(\d+)<', drawing) == ["0", "5", "10"]


def test_a_wide_interval_is_in_the_pareto_plot_and_one_without_end_goes_on_in_an_arrow() -> None:
    drawing = charts.pareto(["a", "b"], [10, 20], [(0, 400), (12, 32)], [0.5, 0.6])  # of two rounds, say
    for kind in ("s0", "s1"):
        ((begin, end),) = re.findall(rf'x1="([^"]+)"[^>]*x2="([^"]+)"[^>]*whisker {kind}', drawing)
        assert 0 < float(begin) < float(end) < charts.WIDTH
    assert len(re.findall('<path[^>]*class="s0"', drawing)) == 2, "an arrow at both ends"
    assert not re.search('<path[^>]*class="s1"', drawing)
    whole = charts.pareto(["a", "b"], [10, 20], [(5, 55), (12, 32)], [0.5, 0.6])
    assert "<path" not in whole


def test_names_in_the_pareto_plot_lie_neither_on_each_other_nor_on_dots_nor_on_intervals() -> None:
    names = ["student.openvino.int8.onnx", "student.int8.onnx", "student.onnx", "student.pt", "student.plan"]
    p50_ms, miou = [16.0, 16.5, 18.0, 18.2, 18.1], [0.608, 0.608, 0.609, 0.607, 0.608]
    drawing = charts.pareto(names, p50_ms, [(ms, 1.2 * ms) for ms in p50_ms], miou)
    boxes = [
        (float(x) - 6, float(y) - 6, float(x) + 6, float(y) + 6)
        for x, y in re.findall(r'<circle cx="([^"]*)" cy="([^"]*)"', drawing)
    ]
    whiskers = re.findall(r'<line x1="([^"]*)" y1="([^"]*)" x2="([^"]*)" y2="([^"]*)" class="whisker', drawing)
    boxes += [(float(x1), float(y1) - 1, float(x2), float(y2) + 1) for x1, y1, x2, y2 in whiskers]
    for name in names:
        found = re.search(rf'<text x="([^"]*)" y="([^"]*)" text-anchor="(start|end)"[^>]*>{name}<', drawing)
        assert found is not None
        x, baseline, width = float(found[1]), float(found[2]), 6.5 * len(name)
        left = x if found[3] == "start" else x - width
        box = (left, baseline - 10, left + width, baseline + 2)
        assert not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes), name
        boxes.append(box)
    assert len(boxes) == 3 * len(names)
    assert drawing.rindex("<line") < drawing.index("<circle"), "no line strikes through a dot or a name"


def test_names_from_outside_do_not_become_markup(report: dict[str, Any], tmp_path: Path) -> None:
    odd = json.loads(json.dumps(report))
    odd["artifacts"][0]["path"] = "<script>x"
    odd["data"] = "<b>data"
    write_report(odd, [], tmp_path)
    assert "<script>" not in (tmp_path / "report.html").read_text()
    assert "<b>data" not in (tmp_path / "report.html").read_text()


def test_noise_is_said(report: dict[str, Any]) -> None:
    noisy = json.loads(json.dumps(report))
    noisy["noise"] = ["other processes kept 1.0 cores busy"]
    for row in noisy["artifacts"]:
        row["noise"] = ["the median is uncertain by 9 %", "frames scatter by 30 % of their mean"]
    assert "Noisy run" in to_markdown(noisy)
    _, first, second = tables.noise(noisy)
    assert first == "best.pt: the median is uncertain by 9 %, frames scatter by 30 % of their mean"
    assert second.startswith("student.onnx: the median")
    quiet = noisy | {"noise": [], "artifacts": [row | {"noise": []} for row in noisy["artifacts"]]}
    assert "Noisy run" not in to_markdown(quiet)


def test_mlperf_scenarios(trained: Path) -> None:
    pytest.importorskip("mlperf_loadgen")
    from aicsd_deploy.bench.loadgen import run_loadgen

    frames = [np.full((1, 48, 64, 3), i, np.uint8) for i in range(4)]
    with open_backend(trained / ONNX, device="cpu", threads=1) as backend:
        found = run_loadgen(backend, frames, seconds=0.3, batch=1)
    # Valid or not is a matter of time on a busy machine; that loadgen said so is not.
    assert {type(found["single_stream_valid"]), type(found["offline_valid"])} == {bool}
    assert 0 < found["single_stream_p90_ms"] < found["single_stream_ms"] < 1000
    assert found["offline_fps"] > 1


class FakeNvml:
    """NVML as nvidia-ml-py offers it, for a GPU that spends 5 J between two readings."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksEventReasonSwPowerCap = 4
    nvmlClocksEventReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def __init__(self, reasons: int) -> None:
        self.energy, self.reasons = 1000, reasons

    def __getattr__(self, name: str) -> Any:
        return {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: self.reasons,
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: self.energy,
            "nvmlDeviceGetClockInfo": lambda gpu, which: {1: 1980, 2: 3201}[which],
            "nvmlDeviceGetTemperature": lambda gpu, which: 41,
            "nvmlDeviceGetMemoryInfo": lambda gpu: type("Memory", (), {"used": 2_000_000_000}),
        }[name]


@pytest.mark.parametrize(("reasons", "throttled"), [(1, False), (4, True), (64, True)])
def test_power_and_energy_are_worked_out_of_the_counters(reasons: int, throttled: bool) -> None:
    nvml = FakeNvml(reasons)
    meter = GpuMeter(nvml, 0)
    before = meter.read()
    nvml.energy += 5000
    use = meter.use_since(before, frames=50, seconds=0.25)
    assert (use.power_w, use.energy_mj_per_frame) == (20.0, 100.0)
    assert (use.sm_mhz, use.memory_used_mb, use.throttled) == (1980, 2000.0, throttled)
    assert GpuMeter.of("cpu") is None


def test_the_gpu_is_the_one_that_cuda_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(uuid=f"uuid-of-{index}"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert GpuMeter(FakeNvml(0), 1)._gpu == "GPU-uuid-of-1"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert GpuMeter(FakeNvml(0), 1)._gpu == 1
