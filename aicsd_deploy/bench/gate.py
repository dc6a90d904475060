"""A report against limits, and against an earlier report: what fails somebody's CI."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from aicsd_deploy.bench.report import SCHEMA_VERSION
from aicsd_deploy.bench.tables import short_names
from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.files import existing_file
from aicsd_deploy.metadata import refuse_newer

_RULE = re.compile(
    r"\s*(?P<metric>\w+)\s*(?P<sign>[<>])\s*(?:(?P<ratio>\d+(?:\.\d+)?)\s*x|(?P<limit>[+-]?\d+(?:\.\d+)?))\s*"
)
_TO_REFERENCE = ("agreement", "p50_ratio")
"""Metrics that hold an artefact against its report's reference."""


@dataclass(frozen=True)
class Rule:
    """When an artefact fails.

    Attributes:
        text: as the user wrote it.
        metric: a number in each artefact's row of report.json.
        above: it fails above the limit; else below.
        limit: what is compared with it depends on `kind`.
        kind: "ratio" new / old ("p50_ms>1.1x"), "difference" new - old ("miou<-0.005"; the number has a sign), or
            "value" new alone ("p50_ms>20").
    """

    text: str
    metric: str
    above: bool
    limit: float
    kind: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read a rule.

        Raises:
            InputError: it is none.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise InputError(
                f"--fail-if {text!r} is no rule. Write METRIC>LIMIT or METRIC<LIMIT, where LIMIT is a ratio to the baseline "
                "(p50_ms>1.1x), a difference from it with its sign (miou<-0.005), or a value (p50_ms>20)."
            )
        limit = match["ratio"] or match["limit"]
        kind = "ratio" if match["ratio"] else "difference" if limit[0] in "+-" else "value"
        return cls(text, match["metric"], match["sign"] == ">", float(limit), kind)

    def measured(self, new: float, old: float | None) -> float:
        """Return what the limit is compared with; without a baseline, where only values are limited, there is nothing old."""
        if self.kind == "value" or old is None:
            return new
        if self.kind == "ratio" and old == 0:
            return float("inf") if new else 1.0
        if self.kind == "ratio":
            return new / old
        return new - old


def require_baseline(baseline: Path | None, rules: Sequence[Rule]) -> None:
    """Raise InputError unless an earlier report is given where, and only where, there is something to hold against it."""
    relative = [rule for rule in rules if rule.kind != "value"]
    if baseline is None and relative:
        raise InputError(
            f"--fail-if {relative[0].text!r} compares with an earlier report: name its report.json with --baseline, or give a value "
            "as the limit (p50_ms>20)."
        )
    if baseline is not None and not rules:
        raise InputError("--baseline is compared by --fail-if: say when it fails (p50_ms>1.1x).")


def read_baseline(path: Path) -> dict[str, Any]:
    """Read an earlier report.json.

    Raises:
        InputError: it is none, or of a newer version.
    """
    existing_file(path, "The baseline")
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        version = int(report.get("schema_version", 1))
        rows = [(Path(row["path"]), row.items()) for row in report["artifacts"]]
        # Looked up only to find out whether they are there.
        rows[report.get("reference", 0)], report["data"], report["split"], report.get("environment", {}).items()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is no report.json of this toolkit ({error!r}). Give one that demo/benchmark.py wrote."
        ) from error
    refuse_newer(version, SCHEMA_VERSION, origin=path)
    return report


def require_comparable(
    paths: Sequence[str], reference: int, baseline: dict[str, Any], rules: Sequence[Rule]
) -> list[dict[str, Any]]:
    """See, before anything is measured, that every artefact can be held against an earlier report.

    Args:
        paths: the artefacts.
        reference: which of them is the reference.
        baseline: the earlier report.
        rules: what is to be compared.

    Returns:
        the partner of each artefact among the baseline's rows.

    Raises:
        InputError: an artefact has no partner, or its partner not the number that a rule asks for.
    """
    partners = _partners(paths, baseline)
    for name, partner in zip(short_names(paths), partners, strict=True):
        for rule in rules:
            _require_number(rule, f"the baseline's {name}", partner)
    relative = [rule for rule in rules if rule.metric in _TO_REFERENCE]
    old_reference = baseline["artifacts"][baseline.get("reference", 0)]
    if relative and len(paths) == 1:
        raise InputError(
            f"--fail-if {relative[0].text!r}: {relative[0].metric} is that to the reference, and {paths[0]} alone is its own. Give "
            "the artefact of the baseline that it was held against as well."
        )
    if relative and partners[reference] is not old_reference:
        raise InputError(
            f"--fail-if {relative[0].text!r}: {relative[0].metric} is that to the reference, which is {paths[reference]} here and "
            f"{old_reference['path']} in the baseline. Name the same one with --reference."
        )
    return partners


def require_no_worse(report: dict[str, Any], baseline: dict[str, Any] | None, rules: Sequence[Rule]) -> list[str]:
    """Hold every artefact against limits, and against its partner in an earlier report if there is one.

    Returns:
        one line for each comparison, all of which passed.

    Raises:
        InputError: something cannot be compared: see `require_comparable`, or the data are others.
        VerificationError: a rule fails; all that do are listed.
    """
    rows = report["artifacts"]
    paths = [row["path"] for row in rows]
    partners: Sequence[dict[str, Any] | None] = [None] * len(rows)
    if baseline is not None:
        partners = require_comparable(paths, report["reference"], baseline, rules)
    passed: list[str] = []
    failed: list[str] = []
    for name, row, partner in zip(short_names(paths), rows, partners, strict=True):
        if baseline is not None and partner is not None:
            _require_same_labels(name, report, row, baseline, partner)
        for rule in rules:
            _require_number(rule, name, row)
            value, before = row[rule.metric], None if partner is None else partner[rule.metric]
            found = rule.measured(value, before)
            over = (found - rule.limit) * (1 if rule.above else -1)
            broken = over > 1e-9 * max(1.0, abs(rule.limit))  # 0.695 - 0.7 is a little less than -0.005
            was = "" if before is None else f"{before:.4g} -> "
            shown = {"ratio": f"{found:.3f}x; ", "difference": f"{found:+.4g}; ", "value": ""}[rule.kind]
            line = f"{name}: {rule.metric} {was}{value:.4g} ({shown}fails if {rule.text})"
            (failed if broken else passed).append(line)
    if failed:
        title = "Beyond the limits:" if baseline is None else "Worse than the baseline:"
        raise VerificationError(title + "\n  " + "\n  ".join(failed))
    return passed


def other_machine(report: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Return what the two were not both measured with, in words; empty where nothing is known to differ."""
    new, old = (found.get("environment", {}) | {"threads": found.get("threads")} for found in (report, baseline))
    names = {"cpu": "CPU", "cpu_cores": "CPU cores", "gpu": "GPU", "threads": "--threads"}
    differ = [key for key in names if old.get(key) != new.get(key)]
    return "; ".join(f"{names[key]} {old.get(key) or 'none'} there, {new.get(key) or 'none'} here" for key in differ)


def _partners(paths: Sequence[str], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each artefact, the baseline's row whose path ends in most of the same names.

    They must share as many as tell the artefact from the others, the file's own at least, and no two rows may share as many.
    """
    rows, found, alone = baseline["artifacts"], [], []
    for path, name in zip(paths, short_names(paths), strict=True):
        # The very path tells more than any end of it.
        shared = [_shared_names(path, row["path"]) + (path == row["path"]) for row in rows]
        most = max(shared)
        if most < len(Path(name).parts) or shared.count(most) > 1:
            alone.append(name)
        else:
            found.append(rows[shared.index(most)])
    if alone:
        raise InputError(
            f"The baseline must have one {', one '.join(alone)} to compare with: it has {', '.join(row['path'] for row in rows)}. Leave it "
            "out, name it as there, or make the baseline again with it."
        )
    return found


def _shared_names(one: str, other: str) -> int:
    """Return in how many names of folders and files two paths end alike."""
    pairs = zip(reversed(Path(one).parts), reversed(Path(other).parts), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _require_same_labels(
    name: str, report: dict[str, Any], row: dict[str, Any], baseline: dict[str, Any], partner: dict[str, Any]
) -> None:
    """Raise InputError unless an artefact was scored on the same labels in both reports, under whatever path.

    How many pixels the labels give to each class tells; a baseline that is older than that record must name the same data.
    """
    pairs = ((report, row), (baseline, partner))
    now, before = (f"{one['data']} ({one['split']}, {scored.get('images')} images)" for one, scored in pairs)
    known = "label_pixels" in partner
    if row["label_pixels"] != partner["label_pixels"] if known else now != before:
        raise InputError(
            f"{name} was scored on {before} for the baseline, and now on {now}: on other labels, they say nothing about each "
            "other. Give the same --data and --split, or make the baseline again."
        )


def _require_number(rule: Rule, name: str, row: dict[str, Any]) -> None:
    numbers = [key for key, value in row.items() if isinstance(value, int | float)]
    if rule.metric not in numbers:
        raise InputError(f"--fail-if {rule.text!r}: {name} has no number {rule.metric!r}. It has {', '.join(numbers)}.")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")
