"""Line charts and picture grids: one small drawing, written as SVG (always) and as PNG (with Pillow).

A drawing is a list of lines and texts in a fixed coordinate system; the two writers at the end only translate it, so
both files show the same. This needs no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from vqfast._files import atomic_file, write_atomic

COLOURS = ("#1f5fa8", "#d1602b", "#2d8a57", "#8a4fa3", "#a8871f", "#5b6770")
INK, GRID = "#222222", "#dddddd"
CHART_WIDTH, CHART_HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 44  # margins of one chart, in the drawing's units


@dataclass
class Chart:
    """One set of axes: named series of (x, y) points; points that are not finite are left out."""

    title: str
    x_label: str
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    log_y: bool = False


@dataclass
class _Drawing:
    width: float
    height: float
    lines: list[tuple[list[tuple[float, float]], str, float]] = field(default_factory=list)  # points, colour, width
    texts: list[tuple[float, float, str, float, str]] = field(
        default_factory=list
    )  # x, baseline, text, size, start|middle|end


def save_charts(charts: Sequence[Chart], path: Path) -> list[Path]:
    """Draws the charts side by side and writes ``path`` with .svg, and with .png where Pillow is installed.

    Returns:
        The files that were written.
    """
    drawing = _Drawing(CHART_WIDTH * len(charts), CHART_HEIGHT)
    for number, chart in enumerate(charts):
        _draw_chart(drawing, chart, CHART_WIDTH * number)
    write_atomic(path.with_suffix(".svg"), _to_svg(drawing))
    written = [path.with_suffix(".svg")]
    try:
        import PIL  # noqa: F401
    except ImportError:
        return written
    with atomic_file(path.with_suffix(".png")) as file:
        _to_picture(drawing).save(file, "PNG")
    return [path.with_suffix(".png"), *written]


def _draw_chart(drawing: _Drawing, chart: Chart, left: float) -> None:
    """Frame, ticks, series and legend of one chart, starting at x = left."""
    x0, x1, y0, y1 = left + _LEFT, left + CHART_WIDTH - _RIGHT, CHART_HEIGHT - _BOTTOM, _TOP
    series = {name: _finite(*points, chart.log_y) for name, points in chart.series.items()}
    xs = np.concatenate([points[0] for points in series.values()] or [np.zeros(0)])
    ys = np.concatenate([points[1] for points in series.values()] or [np.zeros(0)])
    x_ticks, y_ticks = _ticks(xs), (_log_ticks(ys) if chart.log_y else _ticks(ys))
    scale = (lambda y: np.log10(y)) if chart.log_y else (lambda y: y)
    if len(xs) and xs.min() < xs.max():  # steps and codes end where they end, not at a round number
        x_ticks = [tick for tick in x_ticks if xs.min() <= tick <= xs.max() * 1.000001]
        to_x = _mapping(min(x_ticks[0], xs.min()), xs.max(), x0, x1)
    else:
        to_x = _mapping(x_ticks[0], x_ticks[-1], x0, x1)
    to_y = _mapping(scale(y_ticks[0]), scale(y_ticks[-1]), y0, y1)

    drawing.texts.append(((x0 + x1) / 2, _TOP - 14, chart.title, 14, "middle"))
    drawing.texts.append(((x0 + x1) / 2, CHART_HEIGHT - 10, chart.x_label, 11, "middle"))
    for tick in y_ticks:
        drawing.lines.append(([(x0, to_y(scale(tick))), (x1, to_y(scale(tick)))], GRID, 0.8))
        drawing.texts.append((x0 - 6, to_y(scale(tick)) + 4, _label(tick), 11, "end"))
    for tick in x_ticks:
        drawing.lines.append(([(to_x(tick), y0), (to_x(tick), y0 + 4)], INK, 0.8))
        drawing.texts.append((to_x(tick), y0 + 17, _label(tick), 11, "middle"))
    drawing.lines.append(([(x0, y1), (x0, y0), (x1, y0)], INK, 1.0))
    for number, (name, (px, py)) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(float(to_x(x)), float(to_y(scale(y)))) for x, y in zip(px, py, strict=True)]
        if len(points) == 1:  # one point makes no line: draw a short dash
            points = [(points[0][0] - 3, points[0][1]), (points[0][0] + 3, points[0][1])]
        if points:
            drawing.lines.append((points, colour, 1.6))
        if len(series) > 1:
            drawing.lines.append(([(x1 - 110, y1 + 10 + 15 * number), (x1 - 92, y1 + 10 + 15 * number)], colour, 2.5))
            drawing.texts.append((x1 - 86, y1 + 14 + 15 * number, name, 11, "start"))
    if not len(xs):
        drawing.texts.append(((x0 + x1) / 2, (y0 + y1) / 2, "no values yet", 12, "middle"))


def _finite(xs: Sequence[float], ys: Sequence[float], positive: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    keep = np.isfinite(x) & np.isfinite(y) & ((y > 0) if positive else True)
    return x[keep], y[keep]


def _mapping(a: float, b: float, to_a: float, to_b: float):
    """The straight map that takes a to to_a and b to to_b."""
    span = (b - a) or 1.0
    return lambda value: to_a + (value - a) / span * (to_b - to_a)


def _ticks(values: np.ndarray) -> list[float]:
    """About five round numbers that enclose the values."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _log_ticks(values: np.ndarray) -> list[float]:
    """Powers of ten that enclose the values; 1-2-5 steps when they span less than two decades."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [m * 10.0**p for p in powers for m in ((1, 2, 5) if high / low < 100 else (1,))]
    below, above = [m for m in marks if m <= low * 1.000001], [m for m in marks if m >= high * 0.999999]
    return [m for m in marks if below[-1] <= m <= above[0]] if below[-1] < above[0] else [below[-1], above[1]]


def _label(value: float) -> str:
    """A tick's text: short, no exponent for everyday numbers."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    text = f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _to_svg(drawing: _Drawing) -> str:
    w, h = f"{drawing.width:g}", f"{drawing.height:g}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}"'
    parts = [f'{start} font-family="sans-serif">', f'<rect width="{w}" height="{h}" fill="white"/>']
    for points, colour, width in drawing.lines:
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        look = f'fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linejoin="round"'
        parts.append(f'<polyline points="{path}" {look}/>')
    for x, y, text, size, anchor in drawing.texts:
        place = f'x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" text-anchor="{anchor}"'
        parts.append(f'<text {place} fill="{INK}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _to_picture(drawing: _Drawing, scale: int = 2):
    """The drawing as a Pillow image, drawn at twice its final resolution and scaled down so that lines are smooth."""
    from PIL import Image, ImageDraw

    big = 2 * scale
    image = Image.new("RGB", (round(drawing.width * big), round(drawing.height * big)), "white")
    pen = ImageDraw.Draw(image)
    for points, colour, width in drawing.lines:
        pen.line([(x * big, y * big) for x, y in points], fill=colour, width=max(1, round(width * big)), joint="curve")
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for x, y, text, size, anchor in drawing.texts:
        write_text(pen, x * big, y * big, text, size * big, anchors[anchor])
    return image.reduce(2)


def write_text(pen, x: float, y: float, text: str, size: float, anchor: str = "ls") -> None:
    """Writes text with Pillow's own font; a Pillow without FreeType has only a tiny one, without anchors."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    try:
        pen.text((x, y), text, fill=INK, font=font, anchor=anchor)
    except ValueError:
        pen.text((x, y - size), text, fill=INK, font=font)


def picture_grid(rows: Sequence[tuple[str, np.ndarray]], *, columns: int = 8, least: int = 96):
    """Pictures under each other for comparison: the first row's pictures over the second row's, and so on.

    Args:
        rows: (label, pictures) with pictures uint8 ``[N, H, W, 3]`` or ``[N, H, W, 1]``, N and size the same in
            every row.
        columns: pictures side by side; more pictures make more bands of rows.
        least: smaller pictures are magnified by a whole number (without smoothing) until they are this wide.

    Returns:
        A Pillow image.
    """
    from PIL import Image, ImageDraw

    number, height, width = rows[0][1].shape[:3]
    zoom = max(1, math.ceil(least / width))
    gap, band = 4, 20
    columns = min(columns, number)
    bands = math.ceil(number / columns)
    step = height * zoom + gap
    image = Image.new("RGB", (columns * (width * zoom + gap) + gap, bands * len(rows) * (step + band) + gap), "white")
    pen = ImageDraw.Draw(image)
    for first in range(0, number, columns):
        for line, (label, pictures) in enumerate(rows):
            top = (first // columns * len(rows) + line) * (step + band)
            write_text(pen, gap, top + band - 5, label, 13)
            for place, picture in enumerate(pictures[first : first + columns]):
                tile = Image.fromarray(np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture)
                image.paste(
                    tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST),
                    (gap + place * (width * zoom + gap), top + band),
                )
    return image


def save_picture(image, path: Path) -> Path:
    """Writes a Pillow image as PNG, whole or not at all."""
    with atomic_file(path) as file:
        image.save(file, "PNG")
    return path
