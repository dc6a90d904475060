"""--baseline and --fail-if: what passes, what fails, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aicsd_deploy.bench.gate import Rule, other_machine, read_baseline, require_baseline, require_no_worse
from aicsd_deploy.bench.report import SCHEMA_VERSION
from aicsd_deploy.bench.tables import short_names
from aicsd_deploy.errors import InputError, VerificationError

LABELS = {"label_pixels": {"road": 5}}


def report(**changes: object) -> dict[str, Any]:
    return {
        "data": "d",
        "split": "val",
        "reference": 0,
        "artifacts": [{"path": "x/s.onnx", "p50_ms": 10.0, "miou": 0.5} | LABELS | changes],
    }


@pytest.mark.parametrize(
    ("rule", "numbers", "fails"),
    [
        ("p50_ms>1.1x", {"p50_ms": 10.9}, False),
        ("p50_ms>1.1x", {"p50_ms": 11.1}, True),
        ("miou<-0.005", {"miou": 0.496}, False),
        ("miou<-0.005", {"miou": 0.494}, True),
        ("miou < 0.4", {"miou": 0.41}, False),
        ("miou < 0.4", {"miou": 0.39}, True),
        ("miou<-0.005", {"miou": 0.495}, False),
        ("miou>+0.3", {"miou": 0.8}, False),
        ("p50_ms>+2", {"p50_ms": 11.9}, False),
        ("p50_ms>+2", {"p50_ms": 12.1}, True),
        ("failures>1.1x", {"failures": 1}, True),
        ("failures>1.1x", {"failures": 0}, False),
    ],
)
def test_rules(rule: str, numbers: dict[str, float], fails: bool) -> None:
    baseline = report(failures=0)
    if fails:
        with pytest.raises(VerificationError, match=r"s\.onnx"):
            require_no_worse(report(**numbers), baseline, [Rule.parse(rule)])
    else:
        assert len(require_no_worse(report(**numbers), baseline, [Rule.parse(rule)])) == 1


def test_all_that_fails_is_listed() -> None:
    rules = [Rule.parse("p50_ms>1.1x"), Rule.parse("miou<-0.01")]
    with pytest.raises(VerificationError) as error:
        require_no_worse(report(p50_ms=20, miou=0.4), report(), rules)
    assert "(2.000x; fails if p50_ms>1.1x)" in str(error.value)
    assert "(-0.1; fails if miou<-0.01)" in str(error.value)
    assert "(+0.1; fails if" in require_no_worse(report(miou=0.6), report(), rules[1:])[0]
    assert error.value.exit_code == 3


def test_a_value_needs_no_baseline() -> None:
    rules = [Rule.parse("p50_ms>9"), Rule.parse("miou<0.6"), Rule.parse("miou<0.4")]
    require_baseline(None, rules)
    assert require_no_worse(report(), None, rules[2:]) == ["s.onnx: miou 0.5 (fails if miou<0.4)"]
    with pytest.raises(VerificationError) as error:
        require_no_worse(report(), None, rules)
    assert str(error.value).splitlines()[1:] == [
        "  s.onnx: p50_ms 10 (fails if p50_ms>9)",
        "  s.onnx: miou 0.5 (fails if miou<0.6)",
    ]
    with pytest.raises(InputError, match="has no number 'speed'"):
        require_no_worse(report(), None, [Rule.parse("speed<1")])


@pytest.mark.parametrize("text", ["p50_ms", "p50_ms>", "p50_ms=3", "p50_ms>1.1y", "", ">3", "miou<-0.1x", "miou<nan"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no rule"):
        Rule.parse(text)


def test_what_cannot_be_compared_is_refused() -> None:
    rule = [Rule.parse("p50_ms>1.1x")]
    with pytest.raises(InputError, match=r"t\.onnx"):
        require_no_worse({**report(), "artifacts": [{"path": "t.onnx"}]}, report(), rule)
    with pytest.raises(InputError, match="no number 'speed'"):
        require_no_worse(report(), report(), [Rule.parse("speed>1")])
    with pytest.raises(InputError, match=r"no number 'speed'\. It has p50_ms, miou\."):  # not that of the new one only
        require_no_worse(report(speed=3), report(), [Rule.parse("speed>1")])


def test_other_labels_are_refused_and_another_path_to_the_same_is_not() -> None:
    rule = [Rule.parse("p50_ms>1.1x")]
    elsewhere = {"data": "/ci/d"}
    assert require_no_worse(report() | elsewhere, report(), rule)
    with pytest.raises(InputError, match=r"scored on d \(val, None images\) .*, and now on /ci/d \(val"):
        require_no_worse(report(label_pixels={"road": 6}) | elsewhere, report(), rule)
    with pytest.raises(InputError, match="say nothing about each other"):
        require_no_worse(report(label_pixels={"road": 6}), report(), rule)


def test_a_baseline_that_knows_no_labels_must_name_the_same_data() -> None:
    rule = [Rule.parse("p50_ms>1.1x")]
    old = report(images=4)
    del old["artifacts"][0]["label_pixels"]
    assert require_no_worse(report(images=4), old, rule)
    for new in (report(images=5), report(images=4) | {"data": "other"}, report(images=4) | {"split": "test"}):
        with pytest.raises(InputError, match=r"scored on d \(val, 4 images\)"):
            require_no_worse(new, old, rule)


def many(paths: dict[str, float]) -> dict[str, Any]:
    rows = [{"path": path, "miou": miou, "agreement": miou} | LABELS for path, miou in paths.items()]
    return {"data": "d", "split": "val", "reference": 0, "artifacts": rows}


def test_no_artefact_is_passed_over() -> None:
    rule = [Rule.parse("miou<-0.01")]
    baseline = many({"runs/teacher/best.pt": 0.7, "runs/student/best.pt": 0.6, "s.onnx": 0.6})
    with pytest.raises(InputError, match=r"must have one new\.onnx to compare with: it has runs/teacher/best\.pt"):
        require_no_worse(many({"s.onnx": 0.6, "new.onnx": 0.1}), baseline, rule)
    with pytest.raises(VerificationError, match=r"student/best\.pt: miou"):  # in another folder, as in CI
        require_no_worse(many({"/ci/runs/teacher/best.pt": 0.7, "/ci/runs/student/best.pt": 0.1}), baseline, rule)
    assert len(require_no_worse(many({"s.onnx": 0.6}), baseline, rule)) == 1, "the baseline may have more"


def test_folders_tell_which_of_several_it_was() -> None:
    rule = [Rule.parse("miou<-0.01")]
    baseline = many({"runs/teacher/best.pt": 0.7, "runs/student/best.pt": 0.6})
    assert len(require_no_worse(many({"/ci/runs/student/best.pt": 0.6}), baseline, rule)) == 1
    with pytest.raises(VerificationError):
        require_no_worse(many({"/ci/runs/teacher/best.pt": 0.6}), baseline, rule)
    inside = many({"best.pt": 0.6, "teacher/best.pt": 0.7})  # of a run folder that is the working folder
    assert len(require_no_worse(inside, inside, rule)) == 2
    for unknown in (
        {"best.pt": 0.6},
        {"runs/other/best.pt": 0.6},
        {"a/teacher/best.pt": 0.7, "b/teacher/best.pt": 0.7},
    ):
        with pytest.raises(InputError, match="to compare with"):
            require_no_worse(many(unknown), baseline, rule)


def test_what_is_held_against_the_reference_needs_the_same_one() -> None:
    rule = [Rule.parse("agreement<0.5")]
    baseline = many({"t.pt": 1.0, "s.onnx": 0.9})
    assert len(require_no_worse(baseline, baseline, rule)) == 2
    with pytest.raises(InputError, match=r"which is s\.onnx here and t\.pt in the baseline"):
        require_no_worse(baseline | {"reference": 1}, baseline, rule)
    with pytest.raises(InputError, match="alone is its own"):  # it is 1 whatever happens
        require_no_worse(many({"s.onnx": 1.0}), many({"s.onnx": 1.0}), rule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"schema_version": SCHEMA_VERSION}, None),
        ({"schema_version": 99}, "newer aicsd-deploy"),
        ({"artifacts": []}, r"is no report\.json"),
        ({"artifacts": [{"path": "s.onnx", "miou": float("nan")}]}, r"is no report\.json.*NaN"),
        ({"artifacts": ["s.onnx"]}, r"is no report\.json"),
        ({"reference": 7}, r"is no report\.json"),
        ({"environment": None}, r"is no report\.json"),
    ],
)
def test_a_baseline_that_cannot_be_read_is_refused(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report() | change))
    if message is None:
        assert read_baseline(path) == report() | change
    else:
        with pytest.raises(InputError, match=message):
            read_baseline(path)


def test_another_machine_is_named() -> None:
    one = {"environment": {"cpu": "A", "cpu_cores": 2, "gpu": []}, "threads": None}
    assert other_machine(one, one) == ""
    other = one | {"environment": {"cpu": "B", "cpu_cores": 2, "gpu": []}, "threads": 1}
    assert other_machine(one, other) == "CPU B there, A here; --threads 1 there, none here"


def test_short_names_tell_artefacts_apart() -> None:
    paths = ["exp1/student/best.pt", "exp2/student/best.pt", "teacher/best.pt", "a/s.onnx"]
    assert short_names(paths) == ["exp1/student/best.pt", "exp2/student/best.pt", "teacher/best.pt", "s.onnx"]
    assert short_names(["best.pt", "/runs/best.pt"]) == ["best.pt", "runs/best.pt"]
    assert short_names(["x/s.onnx", "x/s.onnx"]) == ["x/s.onnx", "x/s.onnx"], "the same file twice"
