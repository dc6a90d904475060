"""A report against an earlier one: limits that fail somebody's CI."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aicsd_deploy.bench.tables import short_names
from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.files import existing_file

_RULE = re.compile(r"\s*(?P<metric>\w+)\s*(?P<sign>[<>])\s*(?P<limit>[+-]?\d+(?:\.\d+)?)\s*(?P<times>x?)\s*")


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
        signed = match["limit"][0] in "+-"
        kind = "ratio" if match["times"] else "difference" if signed else "value"
        return cls(text, match["metric"], match["sign"] == ">", float(match["limit"]), kind)

    def measured(self, new: float, old: float) -> float:
        """Return what the limit is compared with."""
        if self.kind == "ratio":
            return new / old if old else float("inf")
        return new - old if self.kind == "difference" else new


def read_baseline(path: Path) -> dict[str, Any]:
    """Read an earlier report.json.

    Raises:
        InputError: it is none.
    """
    existing_file(path, "The baseline")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        _rows(report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no report.json of this toolkit ({error!r}). Give one that demo/benchmark.py wrote."
        ) from error
    return report  # type: ignore[no-any-return]


def require_partners(paths: Sequence[str], baseline: dict[str, Any]) -> None:
    """Raise InputError unless every artefact has one of the same short name in an earlier report."""
    old = _rows(baseline)
    alone = [name for name in short_names(paths) if name not in old]
    if alone:
        raise InputError(
            f"The baseline has no {', '.join(alone)} to compare with: it has {', '.join(old)}. Leave it out, name it as there, or "
            "make the baseline again with it."
        )


def require_no_worse(report: dict[str, Any], baseline: dict[str, Any], rules: Sequence[Rule]) -> list[str]:
    """Hold every artefact against the artefact of the same short name in an earlier report.

    Returns:
        one line for each comparison, all of which passed.

    Raises:
        InputError: something cannot be compared: an artefact without a partner, other data, or a metric that is no number
            in both.
        VerificationError: a rule fails; all that do are listed.
    """
    for key in ("data", "split"):
        if report[key] != baseline.get(key):
            raise InputError(
                f"The baseline was measured on {key} {baseline.get(key)!r}, this report on {report[key]!r}: they say nothing "
                "about each other."
            )
    require_partners([row["path"] for row in report["artifacts"]], baseline)
    new, old = _rows(report), _rows(baseline)
    passed: list[str] = []
    failed: list[str] = []
    for name in new:
        for rule in rules:
            value, before = new[name].get(rule.metric), old[name].get(rule.metric)
            if not isinstance(value, int | float) or not isinstance(before, int | float):
                numbers = [k for k, v in new[name].items() if isinstance(v, int | float)]
                raise InputError(
                    f"--fail-if {rule.text!r}: {name} has no number {rule.metric!r} in both reports. It has {', '.join(numbers)}."
                )
            found = rule.measured(value, before)
            broken = found > rule.limit if rule.above else found < rule.limit
            shown = (
                f"{found:.3f}x"
                if rule.kind == "ratio"
                else f"{found:+.4g}"
                if rule.kind == "difference"
                else f"{found:.4g}"
            )
            line = f"{name}: {rule.metric} {before:.4g} -> {value:.4g} ({shown}; fails if {rule.text})"
            (failed if broken else passed).append(line)
    if failed:
        raise VerificationError("Worse than the baseline:\n  " + "\n  ".join(failed))
    return passed


def _rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the artefacts by short name."""
    return dict(zip(short_names([row["path"] for row in report["artifacts"]]), report["artifacts"], strict=True))
