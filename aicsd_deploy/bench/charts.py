"""The report's drawings as inline SVG: they take their colours from the page, so that they work on light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10
from statistics import median

from aicsd_deploy.runtime.base import STAGES

WIDTH = 720
_LEFT = 190
"""Room for the names of artefacts, in pixels of the drawing."""
_AXIS = 56
"""Room for the numbers of the axis of mIoU."""


def pareto(
    names: Sequence[str], p50_ms: Sequence[float], intervals_ms: Sequence[Sequence[float]], miou: Sequence[float]
) -> str:
    """Draw mIoU over latency, artefacts that no other beats in both joined by a line.

    Args:
        names: one for each artefact, as for the other arguments.
        p50_ms: median latency; the axis is logarithmic.
        intervals_ms: of the median, (low, high). The axis makes room for them up to three times beyond the medians (of a few
            rounds only, they go anywhere); what is cut off ends in an arrow.
        miou: fractions, 0 to 1.
    """
    left, right, top, bottom = _AXIS, WIDTH - 150, 32, 332  # of what lies between the axes, in pixels of the drawing
    ms_low = 0.8 * max(min(low for low, _ in intervals_ms), min(p50_ms) / 3)
    ms_high = 1.25 * min(max(high for _, high in intervals_ms), 3 * max(p50_ms))
    x = _log_scale(ms_low, ms_high, left, right)
    spread = max(0.01, max(miou) - min(miou))
    y_low, y_high = min(miou) - 0.25 * spread, max(miou) + 0.25 * spread  # beyond 0 and 1 too: names need the room

    def y(score: float) -> float:
        return top + (bottom - top) * (1 - (score - y_low) / (y_high - y_low))

    parts = _log_grid(ms_low, ms_high, x, top=top, bottom=bottom, text_y=bottom + 18)
    for tick in _ticks(max(0.0, 100 * y_low), min(100.0, 100 * y_high)):
        parts.append(_line(left, y(tick / 100), right, y(tick / 100), "grid"))
        parts.append(_text(left - 8, y(tick / 100) + 4, f"{tick:g}", "end"))
    title = "median latency, ms (logarithmic) – further left is faster"
    parts.append(_text((left + right) / 2, bottom + 38, title, "middle"))
    parts.append(_text(left - 48, 14, "mIoU, %", "start"))
    at = [(x(ms), y(score)) for ms, score in zip(p50_ms, miou, strict=True)]
    front = sorted((i for i in range(len(at)) if not _beaten(i, p50_ms, miou)), key=lambda i: p50_ms[i])
    points = " ".join(f"{at[i][0]:.1f},{at[i][1]:.1f}" for i in front)
    parts.append(f'<polyline points="{points}" class="front"/>')
    taken = [(at_x - 8, at_y - 8, at_x + 8, at_y + 8) for at_x, at_y in at]
    dots = []
    for i, (name, (at_x, at_y), (low, high)) in enumerate(zip(names, at, intervals_ms, strict=True)):
        begin, end, kind = x(max(low, ms_low)), x(min(high, ms_high)), f"s{i % 8}"
        parts.append(_line(begin, at_y, end, at_y, f"whisker {kind}"))
        if low < ms_low:
            parts.append(_arrow(begin, at_y, -1, kind))
        if high > ms_high:
            parts.append(_arrow(end, at_y, 1, kind))
        taken.append((begin, at_y - 2, end, at_y + 2))
        tip = f"{name}: {p50_ms[i]:.2f} ms ({low:.2f} to {high:.2f}), {100 * miou[i]:.2f} %"
        dots.append(
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="6" class="{kind}"><title>{escape(tip)}</title></circle>'
        )
    labels, leaders = _labels(names, at, taken)
    parts += [*leaders, *dots, *labels]  # dots and names on top of all lines
    return _svg(bottom + 44, "mIoU over latency", parts)


_Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the drawing."""


def _labels(names: Sequence[str], at: Sequence[tuple[float, float]], taken: list[_Box]) -> tuple[list[str], list[str]]:
    """Return the names, each near its dot where nothing is taken yet, and lines that lead to those that had to go far."""
    labels, leaders = [], []
    for i in sorted(range(len(names)), key=lambda i: at[i][1]):
        at_x, at_y = at[i]
        label_x, label_y, anchor = _place_for_name(names[i], at_x, at_y, taken)
        if abs(label_y - 4 - at_y) > 8:
            leaders.append(_line(at_x, at_y, label_x, label_y - 4, f"leader s{i % 8}"))
        labels.append(_text(label_x, label_y, names[i], anchor, "label"))
    return labels, leaders


def _place_for_name(name: str, at_x: float, at_y: float, taken: list[_Box]) -> tuple[float, float, str]:
    """Return x, baseline and anchor of a name beside its dot, and take the place: right or left of it, as near as it is free."""
    width = 7.0 * len(name)
    places = []
    for shift in (0, *(sign * step for step in range(4, 121, 4) for sign in (1, -1))):
        for anchor, left in (("start", at_x + 11), ("end", at_x - 11 - width)):
            box = (left, at_y + shift - 7, left + width, at_y + shift + 7)
            crossed = sum(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            )
            outside = left < _AXIS or box[2] > WIDTH
            places.append((outside, crossed, anchor, box))
    _, _, anchor, box = min(places, key=lambda place: place[:2])  # the first, so the nearest, of the best
    taken.append(box)
    return (box[0] if anchor == "start" else box[2]), box[3] - 3, anchor


def stage_bars(names: Sequence[str], stages_ms: Sequence[dict[str, float]], p50_ms: Sequence[float]) -> str:
    """Draw what each artefact spends on each stage of a frame, beside its median from host to host.

    Args:
        names: one for each artefact, as for the other arguments.
        stages_ms: milliseconds by stage; empty where the runtime does not tell.
        p50_ms: the median from host to host, drawn as a mark.
    """
    longest = 1.02 * max([*p50_ms, *(sum(stages.values()) for stages in stages_ms)])
    scale = (WIDTH - _LEFT - 90) / longest
    parts = []
    for row, (name, stages, p50) in enumerate(zip(names, stages_ms, p50_ms, strict=True)):
        top = 34 * row + 8
        parts.append(_text(_LEFT - 8, top + 15, name, "end", "label"))
        at = float(_LEFT)
        for stage in STAGES:
            if stage in stages:
                width = stages[stage] * scale
                tip = f"{name}, {stage.replace('_', ' ')}: {stages[stage]:.2f} ms"
                parts.append(_bar(at, top, width, 22, f"stage-{stage}", tip))
                at += width
        mark = _LEFT + p50 * scale
        parts.append(_line(mark, top - 3, mark, top + 25, "mark"))
        parts.append(
            _text(max(at, mark) + 8, top + 15, f"{p50:.2f} ms" if stages else f"{p50:.2f} ms, not told", "start")
        )
    return _svg(34 * len(names) + 10, "stages of a frame", parts)


def distributions(names: Sequence[str], times_ms: Sequence[Sequence[float]]) -> str:
    """Draw every single frame time as a dot, and the median as a mark: nothing is left out.

    Args:
        names: one for each artefact.
        times_ms: every timed frame; the axis is logarithmic.
    """
    x_low, x_high = 0.9 * min(map(min, times_ms)), 1.1 * max(map(max, times_ms))
    height = 44 * len(names) + 40
    x = _log_scale(x_low, x_high, _LEFT, WIDTH - 16)
    parts = _log_grid(x_low, x_high, x, top=4, bottom=height - 30, text_y=height - 14)
    parts.append(_text(_LEFT - 8, height - 14, "ms per frame", "end"))
    for row, (name, times) in enumerate(zip(names, times_ms, strict=True)):
        middle = 44 * row + 26
        parts.append(_text(_LEFT - 8, middle + 4, name, "end", "label"))
        for i, time in enumerate(times):
            offset = 13 * (2 * ((i * 0.6180339887) % 1) - 1)  # spread evenly, so that dots of equal times are all seen
            parts.append(f'<circle cx="{x(time):.1f}" cy="{middle + offset:.1f}" r="2.2" class="s{row % 8} dot"/>')
        parts.append(_line(x(median(times)), middle - 18, x(median(times)), middle + 18, "mark"))
    return _svg(height, "distribution of latency", parts)


def class_bars(classes: Sequence[str], reference_iou: Sequence[float | None], iou: Sequence[float | None]) -> str:
    """Draw the IoU of each class beside that of the reference; the order is the caller's.

    Args:
        classes: names.
        reference_iou: fractions of the reference, as a mark; None for a class that never occurs.
        iou: fractions of the artefact, as a bar.
    """
    scale = WIDTH - _LEFT - 130
    parts = []
    for row, (name, before, now) in enumerate(zip(classes, reference_iou, iou, strict=True)):
        top = 24 * row + 4
        parts.append(_text(_LEFT - 8, top + 13, name, "end"))
        change = None if before is None or now is None else 100 * (now - before)
        if now is not None:
            kind = (
                "worse" if change is not None and change < -0.05 else "better" if change and change > 0.05 else "same"
            )
            parts.append(_bar(_LEFT, top, now * scale, 17, kind, f"{name}: {100 * now:.2f} %"))
        if before is not None:
            parts.append(_line(_LEFT + before * scale, top - 2, _LEFT + before * scale, top + 19, "mark"))
        text = "–" if now is None else f"{100 * now:.2f}" + ("" if change is None else f"  ({change:+.2f})")
        parts.append(_text(_LEFT + scale + 10, top + 13, text, "start"))
    return _svg(24 * len(classes) + 8, "IoU by class", parts)


def _beaten(i: int, p50_ms: Sequence[float], miou: Sequence[float]) -> bool:
    return any(
        p50_ms[k] <= p50_ms[i] and miou[k] >= miou[i] and (p50_ms[k], miou[k]) != (p50_ms[i], miou[i])
        for k in range(len(miou))
    )


def _log_scale(low: float, high: float, left: float, right: float) -> Callable[[float], float]:
    """Return what gives a number its place on a logarithmic axis that goes from `low` at `left` to `high` at `right`."""
    return lambda value: left + (right - left) * (log10(value / low) / log10(high / low))


def _log_grid(
    low: float, high: float, x: Callable[[float], float], *, top: float, bottom: float, text_y: float
) -> list[str]:
    """Return the lines of a logarithmic axis and, at `text_y`, their numbers."""
    parts = []
    for tick in _log_ticks(low, high):
        parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), text_y, f"{tick:g}", "middle"))
    return parts


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high / low < 200 else (1,)
    powers = range(floor(log10(low)), floor(log10(high)) + 1)
    found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    return found if len(found) > 1 else _ticks(low, high)


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in a range."""
    rough = (high - low) / 5
    power = 10.0 ** floor(log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = ceil(low / step)
    return [round(step * n, 10) for n in range(first, first + 12) if step * n <= high]


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _arrow(x: float, y: float, towards: int, kind: str) -> str:
    return f'<path d="M{x:.1f},{y - 5:.1f} l{7 * towards},5 l{-7 * towards},5 z" class="{kind}"/>'


def _bar(x: float, y: float, width: float, height: float, kind: str, tip: str) -> str:
    size = f'width="{max(0.0, width):.1f}" height="{height}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="2" class="{kind}"><title>{escape(tip)}</title></rect>'
