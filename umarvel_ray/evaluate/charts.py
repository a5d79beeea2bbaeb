"""Line and bar charts as inline SVG. Colors are classes of the page's style sheet, so dark mode applies to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10


@dataclass(frozen=True)
class Line:
    """One line: y values by position on the x axis. `kind` is its CSS class: local, global, chance, raw or smooth."""

    name: str
    values: Sequence[float]
    kind: str
    dots: bool = False


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers between low and high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** floor(log10(rough))
    spacing = unit * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(unit * factor - rough))
    return [i * spacing for i in range(ceil(low / spacing - 1e-9), floor(high / spacing + 1e-9) + 1)]


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_labels: Sequence[str] = (),
    width: int = 720,
    height: int = 280,
    low: float = 0.0,
    high: float | None = None,
    values: bool = False,
) -> str:
    """An SVG with a y grid and one polyline per line.

    Args:
        title: for screen readers.
        x_labels: one per position, "" for none; without any, positions are numbered from 0.
        low, high: range of the y axis; high defaults to just above the largest value.
        values: write each dot's value next to it.
    """
    left, right, top, bottom = 44, 16, 22 if values else 14, 10 if x_labels and not any(x_labels) else 26
    inset = 40 if any(x_labels) else 0  # room for half a label
    count = max(len(line.values) for line in lines)
    if high is None:
        high = max(max(line.values) for line in lines) * 1.08 or 1.0

    def x(position: float) -> float:
        return left + inset + (width - left - right - 2 * inset) * (position / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (min(value, high) - low) / ((high - low) or 1.0))

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in ticks(low, high, 4 if height > 150 else 2):
        parts.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{width - right}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    names = list(x_labels) or [f"{tick:g}" for tick in ticks(0, count - 1, 3)]
    positions = range(count) if x_labels else ticks(0, count - 1, 3)
    for position, name in zip(positions, names, strict=True):
        parts.append(_text(x(position), height - 8, name, "tick"))
    for line in lines:
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(line.values))
        parts.append(f'<polyline class="line {line.kind}" points="{points}"/>')
        if not line.dots:
            continue
        for i, value in enumerate(line.values):
            label = f"{line.name}, {names[i]}: {value:.3f}" if x_labels else f"{line.name}: {value:.3f}"
            parts.append(
                f'<circle class="dot {line.kind}" cx="{x(i):.1f}" cy="{y(value):.1f}" r="4">'
                f"<title>{escape(label)}</title></circle>"
            )
            if values:
                below = any(other.values[i] > value for other in lines if other.dots and other is not line)
                parts.append(_text(x(i), y(value) + (17 if below else -9), f"{value:.2f}", f"value {line.kind}"))
    return "".join(parts) + "</svg>"


def bar_chart(seconds: Mapping[str, float], title: str) -> str:
    """Horizontal bars of durations, in the order given."""
    width, row, left = 720, 26, 150
    longest = max(seconds.values()) or 1.0
    height = row * len(seconds) + 6
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for number, (name, value) in enumerate(seconds.items()):
        length = max(2.0, (width - left - 70) * value / longest)
        top = row * number + 4
        parts.append(f'<text class="name" x="{left - 10}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{top}" width="{length:.1f}" height="{row - 8}" rx="3"/>')
        parts.append(f'<text class="name" x="{left + length + 8:.1f}" y="{top + 14}">{duration(value)}</text>')
    return "".join(parts) + "</svg>"


def smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Exponential moving average over about this share of the values, with bias correction at the start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def duration(seconds: float) -> str:
    """Seconds as text, for example "1 h 02 min" or "2 min 05 s"."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {left:02} s" if minutes else f"{left} s"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'
