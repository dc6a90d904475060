"""A report as files: report.json for programs, report.md and report.html for people, MODEL_CARD.md to ship."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aicsd_deploy.bench import tables
from aicsd_deploy.bench.pictures import Picture
from aicsd_deploy.bench.report_html import headline, to_html
from aicsd_deploy.console import percent, table
from aicsd_deploy.files import write_json, write_text

WEAK_IOU = 0.3
"""A class below this is named in the model card as one not to rely on."""


def write_report(report: dict[str, Any], pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write the four files into a folder and return their paths."""
    texts = {
        "report.md": to_markdown(report),
        "report.html": to_html(report, pictures),
        "MODEL_CARD.md": to_model_card(report),
    }
    write_json(folder / "report.json", report)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / "report.json", *(folder / name for name in texts)]


def to_markdown(report: dict[str, Any]) -> str:
    """Return report.md."""
    parts = ["# Accuracy and latency", *([_items(headline(report))] if len(report["artifacts"]) > 1 else [])]
    if tables.noise(report):
        parts += [
            "**Noisy run.** Repeat it on an idle machine before you rely on small differences.",
            _items(tables.noise(report)),
        ]
    parts += [
        table(*tables.summary(report)),
        tables.method(report),
        "## Latency, ms per frame",
        table(*tables.latency(report)),
        "## Stages of a frame",
        table(*tables.stages(report)),
        "## What it takes",
        table(*tables.costs(report)),
    ]
    if gpu := tables.gpu(report):
        parts += ["## Power and clocks", table(*gpu)]
    if loadgen := tables.loadgen(report):
        parts += ["## MLPerf's load generator", table(*loadgen), tables.loadgen_method(report)]
    parts += ["## IoU of each class, %", table(*tables.classes(report)), "## Measured on"]
    parts += [_items(f"{name}: {value}" for name, value in tables.machine(report)[1])]
    parts += [f"`{report['provenance']['command']}`"]
    return "\n\n".join(parts) + "\n"


def to_model_card(report: dict[str, Any]) -> str:
    """Return MODEL_CARD.md for the last artefact. Source of its parts: Mitchell et al., arXiv 1810.03993."""
    row, name = report["artifacts"][-1], tables.names_of(report)[-1]
    origin = row["artifact_provenance"]
    unseen = [n for n, pixels in row["label_pixels"].items() if not pixels]
    weak = [n for n, iou in row["per_class_iou"].items() if n not in unseen and (iou or 0) < WEAK_IOU]
    trained = "elsewhere" if row["method"] == "elsewhere" else f'with method "{row["method"]}"'
    headers, rows = tables.summary(report)
    height, width = row["image_size_hw"]
    limits = [
        f"Scores are of {report['data']} ({report['split']}, {row['images']} images). On other cameras, places or weather they "
        "were not measured.",
        f"Do not rely on {', '.join(weak)}: below {100 * WEAK_IOU:.0f} % IoU." if weak else "",
        f"Nothing is known about {', '.join(unseen)}: no label of the images has it." if unseen else "",
        f"Latency is that of the machine below; runs in {row['runtime']}.",
    ]
    iou = [[n, percent(v)] for n, v in row["per_class_iou"].items()]
    return f"""# {name}

A {row["role"]} network for semantic segmentation: {row["model"]}, {row["precision"]}, trained {trained}.

- Takes: frames of {height}x{width} (HxW), uint8; normalisation is inside.
- Gives: the class of every pixel, uint8; {len(iou)} classes.
- Made with: {"; ".join(f"{key} {value}" for key, value in sorted(origin.items()) if value) or "unknown"}

## Measured

{table(headers, rows)}

{table(["class", "IoU, %"], iou)}

{tables.method(report)}

## Limits

{_items(text for text in limits if text)}

## Measured on

{_items(f"{key}: {value}" for key, value in tables.machine(report)[1])}
"""


def _items(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)
