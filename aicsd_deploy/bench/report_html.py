"""report.html: one page that needs no network, light and dark."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from aicsd_deploy.bench import charts, tables
from aicsd_deploy.bench.pictures import Picture
from aicsd_deploy.errors import MissingDependencyError


def require_jinja() -> Any:
    """Return the module, or raise MissingDependencyError with the way to get it."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            f"report.html needs jinja2 ({error}). Install it with: pip install 'aicsd-deploy[bench]'"
        ) from error
    return jinja2


def to_html(report: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """Return the page.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2 = require_jinja()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    rows, names = report["artifacts"], tables.names_of(report)
    reference = rows[report["reference"]]
    p50_ms = [row["p50_ms"] for row in rows]
    losers = {i: tables.losers_first(row, reference) for i, row in enumerate(rows) if row is not reference}
    page: str = template.render(
        report=report,
        names=names,
        reference_name=names[report["reference"]],
        headline=headline(report),
        noise=tables.noise(report),
        summary=tables.summary(report),
        pareto=charts.pareto(names, p50_ms, [row["p50_interval_ms"] for row in rows], [row["miou"] for row in rows]),
        stages=tables.stages(report),
        stage_bars=charts.stage_bars(names, [row["stages_ms"] for row in rows], p50_ms),
        latency=tables.latency(report),
        distributions=charts.distributions(names, [row["times_ms"] for row in rows]),
        costs=tables.costs(report),
        gpu=tables.gpu(report),
        loadgen=tables.loadgen(report),
        loadgen_method=tables.loadgen_method(report),
        classes=tables.classes(report),
        class_bars=[
            (
                names[i],
                charts.class_bars(
                    order,
                    [reference["per_class_iou"][name] for name in order],
                    [rows[i]["per_class_iou"][name] for name in order],
                ),
            )
            for i, order in losers.items()
        ],
        pictures=[
            (names[p.artifact], p.kind, p.frame, {t: b64encode(jpeg).decode() for t, jpeg in p.panels.items()})
            for p in pictures
        ],
        machine=tables.machine(report),
        method=tables.method(report),
    )
    return page


def headline(report: dict[str, Any]) -> list[str]:
    """Return, for every artefact but the reference, how much faster it is, with its 95 % interval, and what it lost."""
    rows, names = report["artifacts"], tables.names_of(report)
    reference = rows[report["reference"]]
    lines = []
    for name, row in zip(names, rows, strict=True):
        if row is reference:
            continue
        ratio, points = reference["p50_ms"] / row["p50_ms"], 100 * (row["miou"] - reference["miou"])
        change = f"{'gains' if points > 0 else 'loses'} {abs(points):.2f} points of mIoU"
        low, high = (1 / share for share in reversed(row["p50_ratio_interval"]))
        before, now = reference["per_class_iou"], row["per_class_iou"]
        lost = [n for n in tables.losers_first(row, reference) if (now[n] or 0) - (before[n] or 0) < -0.01]
        invented = [n for n in now if (now[n] is None) != (before[n] is None)]
        lines.append(
            f"{name} takes {tables.number(row['p50_ms'])} ms a frame, {ratio:.2f} times ({low:.2f} to {high:.2f}) as fast as "
            f"{names[report['reference']]}, and {change if abs(points) >= 0.005 else 'has the same mIoU'}."
            + (f" It loses most in {', '.join(lost[:2])}." if lost else "")
            + (
                f" Only one of the two predicts {', '.join(invented)}, which no label has: that alone moves mIoU."
                if invented
                else ""
            )
        )
    return lines
