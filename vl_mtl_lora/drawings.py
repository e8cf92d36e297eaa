"""Numbers -> SVG, to stand in an HTML page: heat maps, bars of mixtures, curves.

Every text is escaped. Each drawing tells its main finding in its aria-label, every cell its value in a tooltip, and
nothing by colour alone. Colours are the page's CSS variables, so that they follow its light or dark mode; `STYLE` has
those that are the drawings' own. Heat maps and bars have a fixed width, so that their letters keep their size: put them
where a wide one may scroll.
"""

import html
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

# Of a scale the darkest cell has _DEEPEST of the hue, over which --ink has a contrast of 4.5 in both modes.
STYLE = """
:root { --heat: #2a6fbb; --cold: #c2571a; --curve-1: #2a6fbb; --curve-2: #c2571a; --curve-3: #3b8c4a;
  --curve-4: #8a4fa8; --curve-5: #a33; --curve-6: #666 }
@media (prefers-color-scheme: dark) {
  :root { --heat: #4085cf; --curve-1: #6fb0f5; --curve-2: #ef9560; --curve-3: #74c784; --curve-4: #c795e0;
    --curve-5: #f08484; --curve-6: #b5b5b5 }
}
.drawing text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.drawing .value { font-size: 11px; font-variant-numeric: tabular-nums; fill: var(--ink); pointer-events: none }
.drawing .group { font-weight: 600; fill: var(--ink) }
"""
_COLOURS = ("#2a6fbb", "#c2571a", "#3b8c4a", "#8a4fa8", "#a33", "#666")
_DASHES = ("none", "8 3", "2 3", "9 3 2 3", "14 4", "5 5")
_DEEPEST = 0.75
_LINE = "stroke='var(--line, #ddd)'"
_NARROW = 340  # pixels that a telephone has for a drawing
_LETTER = 7.2  # pixels that a letter takes at most, on average
_LEAN = math.radians(60)  # of column names that have no room


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], label: str,
             spec: str = ".2f", *, groups: Sequence[str] | None = None, limits: tuple[float, float] | None = None,
             axes: tuple[str, str] | None = None, off_diagonal: bool = False) -> str:
    """Values as shades of one hue, from 0 on; of two hues where the scale has negative ones. "" without any cell.

    Args:
        values: rows x columns; None, or no finite number: a crossed empty cell.
        label: what the values are, which the aria-label begins with.
        spec: how a value is written; the numbers stand in the cells where all fit.
        groups: of each row; a heading stands over the rows of one group.
        limits: the scale's ends, those of the values unless given.
        axes: what the rows and the columns are.
        off_diagonal: the finding, which is framed and in the aria-label, is a value beside the diagonal.
    """
    if not rows or not columns:
        return ""
    cells = [(value, r, c) for r, row in enumerate(values) for c, value in enumerate(row)
             if value is not None and math.isfinite(value)]
    found = [cell for cell in cells if not off_diagonal or cell[1] != cell[2]]
    low, high = limits or (min([0, *(v for v, *_ in cells)]), max([0, *(v for v, *_ in cells)]))
    if low < 0:  # both hues alike
        low, high = -max(-low, high), max(-low, high)
    number = 0.9 * max((_width(format(v, spec)) for v, *_ in cells), default=0) + 8
    grid = _Grid(rows, columns, groups, axes, number, 26)
    parts = [*grid.frame()]
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            x, y, w, h = grid.cell(r, c)
            where = _safe(grid.place(r, c))
            if value is None or not math.isfinite(value):
                parts.append(f"<path class='empty' fill='none' {_LINE} d='{_crossed(x, y, w, h)}'>"
                             f"<title>{where}: no value</title></path>")
                continue
            parts.append(f"<rect class='cell' x='{x:.1f}' y='{y:.1f}' width='{w:.1f}' height='{h:.1f}' "
                         f"{_shade(value, low, high)}><title>{where}: {value:{spec}}</title></rect>")
            if grid.roomy:
                parts.append(f"<text class='value' x='{x + w / 2:.1f}' y='{y + h / 2 + 4:.1f}' text-anchor='middle'>"
                             f"{value:{spec}}</text>")
    peak, bottom = (best(found, key=lambda cell: cell[0], default=None) for best in (max, min))
    if peak is None:
        finding = "no values"
    elif peak[0] == bottom[0]:
        finding = f"{peak[0]:{spec}} everywhere"
    else:
        finding = f"highest is {peak[0]:{spec}} for {grid.place(*peak[1:])}"
        if low < 0:
            finding += f"; lowest is {bottom[0]:{spec}} for {grid.place(*bottom[1:])}"
        x, y, w, h = grid.cell(*peak[1:])
        parts.append(f"<rect class='peak' x='{x:.1f}' y='{y:.1f}' width='{w:.1f}' height='{h:.1f}' fill='none' "
                     "style='stroke: var(--ink, #1b1b1b)' stroke-width='1.5' pointer-events='none'/>")
    left, steps = _width(format(low, spec)) + 6, 9
    y = grid.bottom + 12
    parts.append(f"<text x='{left - 6:.1f}' y='{y + 10:.1f}' text-anchor='end'>{low:{spec}}</text>")
    for i in range(steps):
        parts.append(f"<rect x='{left + 13 * i:.1f}' y='{y:.1f}' width='13' height='12' "
                     f"{_shade(low + (high - low) * i / (steps - 1), low, high)}/>")
    end = left + 13 * steps
    parts.append(f"<text x='{end + 6:.1f}' y='{y + 10:.1f}'>{high:{spec}}</text>")
    end += 6 + _width(format(high, spec))
    if len(cells) < len(rows) * len(columns):
        parts.append(f"<path fill='none' {_LINE} d='{_crossed(end + 16, y, 13, 12)}'/>"
                     f"<text x='{end + 34:.1f}' y='{y + 10:.1f}'>no value</text>")
        end += 34 + _width("no value")
    return _svg(max(grid.right, end), y + 18, f"{label}: {finding}", parts)


def mixture_bars(rows: Sequence[str], columns: Sequence[str], weights: Sequence[Sequence[Sequence[float]]],
                 label: str, *, groups: Sequence[str] | None = None, axes: tuple[str, str] | None = None,
                 part: str = "up-projection") -> str:
    """Per row and column a bar of N shares that make up 1, the first the darkest. "" without any cell.

    Args:
        weights: rows x columns x N.
        label, groups, axes: see `heat_map`.
        part: what a share is of.
    """
    if not rows or not columns:
        return ""
    grid = _Grid(rows, columns, groups, axes, 40, 20)
    parts, count = [*grid.frame()], len(weights[0][0])
    shades = [f"style='fill: var(--heat, {_COLOURS[0]})' fill-opacity='{0.95 - 0.65 * i / max(1, count - 1):.2f}'"
              for i in range(count)]
    for r, row in enumerate(weights):
        for c, shares in enumerate(row):
            x, y, w, h = grid.cell(r, c)
            told = ", ".join(f"{share:.2f}" for share in shares)
            parts.append(f"<g class='bar'><title>{_safe(grid.place(r, c))}: {told}</title>")
            for share, shade in zip(shares, shades):
                parts.append(f"<rect x='{x:.1f}' y='{y + 1:.1f}' width='{share * (w - 4):.1f}' height='{h - 2:.1f}' "
                             f"{shade}/>")
                x += share * (w - 4)
            parts.append("</g>")
    share, i, r, c = max(((share, i, r, c) for r, row in enumerate(weights) for c, shares in enumerate(row)
                          for i, share in enumerate(shares)), key=lambda found: found[0])
    finding = f"the largest share is {share:.2f}, of {part} {i + 1}, for {grid.place(r, c)}"
    x, y = 0.0, grid.bottom + 12
    parts.append(f"<text x='{x:.1f}' y='{y + 10:.1f}'>{_safe(part)}</text>")
    x += _width(part) + 8
    for i, shade in enumerate(shades):
        parts.append(f"<rect x='{x:.1f}' y='{y:.1f}' width='12' height='12' {shade}/>"
                     f"<text x='{x + 16:.1f}' y='{y + 10:.1f}'>{i + 1}</text>")
        x += 34
    return _svg(max(grid.right, x), y + 18, f"{label}: {finding}", parts)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], label: str, *, axes: tuple[str, str],
           notes: Mapping[str, str] | None = None) -> str:
    """Lines over a common axis from 0 on, as wide as the page, in colours and dashes; "" without any.

    Args:
        series: name -> (x, y), x ascending; fewer than two finite points are no line.
        label: what they are, which the aria-label begins with.
        axes: the names of x and y.
        notes: name -> what the legend says of it.
    """
    lines = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    last = max(points[-1][0] for points in lines.values()) or 1
    ys = _ticks(max(0.0, *(y for points in lines.values() for _, y in points)) or 1.0, 4)
    xs = _ticks(last, min(4, max(1, int(last))))
    top = max(float(ys[-1]), *(y for points in lines.values() for _, y in points))
    left, height = max(map(_width, ys)) + 8, 210
    # In a drawing of no fixed width x is in per cent; what is left of 0 lies in the padding.
    parts = [f"<text x='{-left:.1f}' y='-12'>{_safe(axes[1])}</text>"]
    for tick in ys:
        y = height * (1 - float(tick) / top)
        parts.append(f"<line class='axis' {_LINE} x1='0' x2='100%' y1='{y:.1f}' y2='{y:.1f}'/>"
                     f"<text class='tick' x='-6' y='{y + 4:.1f}' text-anchor='end'>{tick}</text>")
    parts += [f"<text class='tick' x='{100 * float(tick) / last:.2f}%' y='{height + 18}' text-anchor='middle'>{tick}"
              "</text>" for tick in xs]
    parts.append(f"<text x='100%' y='{height + 36}' text-anchor='end'>{_safe(axes[0])}</text>")
    plot = [f"<svg width='100%' height='{height}' viewBox='0 0 1000 1000' preserveAspectRatio='none' "
            "style='max-width: none; overflow: visible'>"]
    y = height + 58
    for i, (name, points) in enumerate(lines.items()):
        look = (f"style='stroke: var(--curve-{i % len(_COLOURS) + 1}, {_COLOURS[i % len(_COLOURS)]})' "
                f"stroke-dasharray='{_DASHES[i % len(_DASHES)]}' stroke-width='2' fill='none'")
        path = " ".join(f"{1000 * x / last:.1f},{1000 * (1 - y / top):.1f}" for x, y in points)
        plot.append(f"<polyline {look} vector-effect='non-scaling-stroke' points='{path}'/>")
        told = [f"{_short(name)}: {notes[name]}" if notes else _short(name)]
        if len(told[0]) > 48:  # too long for a telephone
            told = [_short(name), notes[name]]
        parts.append(f"<line {look} x1='{-left:.1f}' x2='{26 - left:.1f}' y1='{y - 4}' y2='{y - 4}'/>")
        parts += [f"<text class='legend' x='{32 - left:.1f}' y='{y + 16 * k}'>{_safe(line)}</text>"
                  for k, line in enumerate(told)]
        y += 4 + 16 * len(told)
    ends = ", ".join(f"{name} ends at {points[-1][1]:.3g}" for name, points in lines.items())
    return (f"<svg class='drawing' role='img' aria-label='{_safe(f'{label}: {ends}')}' style='box-sizing: border-box; "
            f"width: 100%; max-width: 47rem; height: {y + 10}px; padding: 24px 16px 0 {left:.1f}px; "
            f"overflow: visible'>{''.join([*parts, *plot])}</svg></svg>")


def loss_curves(log: Sequence[Mapping]) -> str:
    """Each task's training loss over steps, each curve divided by its first value; "" without any.

    log: a run's entries, of which `step` and `loss/TASK` are drawn.
    """
    names = sorted({key for entry in log for key in entry if key.startswith("loss/") and key != "loss/total"})
    losses = {name.removeprefix("loss/"): [(entry["step"], entry[name]) for entry in log if name in entry]
              for name in names}
    series = {name: [(step, loss / (points[0][1] or 1.0)) for step, loss in points] for name, points in losses.items()}
    notes = {name: f"{points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {points[-1][0]}"
             for name, points in losses.items()}
    return curves(series, "Training loss per task, relative to its first value", axes=("step", "loss / first loss"),
                  notes=notes)


class _Grid:
    """Where rows x columns of cells lie, in pixels, with names, headings of groups and the names of the axes.

    number: the width at which a cell holds its content; roomy: whether cells have it. height: of a cell at most.
    """

    def __init__(self, rows: Sequence[str], columns: Sequence[str], groups: Sequence[str] | None,
                 axes: tuple[str, str] | None, number: float, height: float):
        self.rows, self.columns, self.groups, self.axes = rows, columns, groups, axes
        self.left = max(_width(_short(name)) for name in [*rows, *(groups or [])]) + 8
        head = max(_width(_short(name)) for name in columns)
        room = (_NARROW - self.left) / len(columns)
        self.roomy = number <= room or len(columns) <= 12
        self.width = max(number, min(head + 8, room)) if self.roomy else max(14.0, room)
        self.leaning = head + 4 > self.width
        self.height = 16.0 if len(rows) > 24 else min(height, self.width) if not self.roomy else height
        self.head = head * math.sin(_LEAN) + 12 if self.leaning else 18.0
        self.tops, self.heads, y = [], [], 18.0 if axes else 0.0
        for r in range(len(rows)):
            if r == 0 or (groups and groups[r] != groups[r - 1]):
                y += (14 if r else 0) + self.head
                self.heads.append((r, y))
            self.tops.append(y)
            y += self.height
        self.bottom, end = y, self.left + self.width * len(columns)
        self.right = max(end, end - self.width / 2 + head * math.cos(_LEAN) + 8) if self.leaning else end

    def cell(self, row: int, column: int) -> tuple[float, float, float, float]:
        """x, y, width, height; a pixel is left free between cells."""
        return self.left + column * self.width, self.tops[row], self.width - 1, self.height - 1

    def place(self, row: int, column: int) -> str:
        """A cell in words."""
        name = f"{self.groups[row]} {self.rows[row]}" if self.groups else self.rows[row]
        first, second = (f"{axis} " for axis in self.axes) if self.axes else ("", "")
        return f"{first}{name} and {second}{self.columns[column]}"

    def frame(self) -> Iterator[str]:
        """All that is not cells."""
        if self.axes:
            yield f"<text x='0' y='12'>{_safe(self.axes[0])} ↓ {_safe(self.axes[1])} →</text>"
        for row, y in self.heads:
            if self.groups:
                yield f"<text class='group' x='0' y='{y - 6:.1f}'>{_label(self.groups[row])}</text>"
            for c, name in enumerate(self.columns):
                x = self.left + (c + 0.5) * self.width
                how = f"transform='rotate(-60 {x:.1f} {y - 6:.1f})'" if self.leaning else "text-anchor='middle'"
                yield (f"<text class='column' x='{x:.1f}' y='{y - 6:.1f}' {how}>{_label(name)}</text>")
        for name, y in zip(self.rows, self.tops):
            yield (f"<text class='row' x='{self.left - 8:.1f}' y='{y + self.height / 2 + 4:.1f}' text-anchor='end'>"
                   f"{_label(name)}</text>")


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (f"<svg class='drawing' role='img' aria-label='{_safe(label)}' viewBox='0 0 {width:.0f} {height:.0f}' "
            f"width='{width:.0f}' style='max-width: none; height: {height:.0f}px'>{''.join(parts)}</svg>")


def _shade(value: float, low: float, high: float) -> str:
    """The fill of a value: the less of the hue the more of the page, so that 0 is the page's colour in both modes."""
    name, colour = ("heat", _COLOURS[0]) if value >= 0 else ("cold", _COLOURS[1])
    start = max(low, 0.0)
    share = min(1.0, max(0.0, abs(value) - start) / (high - start or 1.0))
    return f"style='fill: var(--{name}, {colour})' fill-opacity='{0.03 + (_DEEPEST - 0.03) * share:.3f}'"


def _ticks(top: float, count: int) -> list[str]:
    """0 and up to `count` multiples of 1, 2 or 5 times a power of ten, as far as `top`, written alike."""
    power = math.floor(math.log10(top / count))
    step = next(s for m in (1, 2, 5, 10) if (s := m * 10.0**power) >= top / count * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{i * step:.{digits}f}" for i in range(int(top / step + 1e-9) + 1)]


def _crossed(x: float, y: float, w: float, h: float) -> str:
    return f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h{-w:.1f}zl{w:.1f} {h:.1f}"


def _width(text: str) -> float:
    """Pixels that a text takes at most."""
    return sum(12.0 if unicodedata.east_asian_width(letter) in "WF" else _LETTER for letter in text)


def _short(text: str) -> str:
    return text if len(text) <= 18 else text[:17] + "…"


def _label(text: str) -> str:
    short = _short(text)
    return _safe(short) if short == text else f"<title>{_safe(text)}</title>{_safe(short)}"


def _safe(text: str) -> str:
    return html.escape(str(text))
