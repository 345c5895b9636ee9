"""The report's charts: matplotlib to inline SVG that takes its colours and its font from the page.

Each chart is drawn twice, for a wide page and for a telephone, because text scaled down with a drawing cannot be read; the
page shows one. Colours are drawn as stand-ins and then named as the page's CSS variables, which is how dark mode reaches them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lineate.report.run import Cost, CostRow
from lineate.report.words import number, pixels, sentence

WIDE_PX, NARROW_PX = 740, 328
STAND_INS = {"ink": "#010203", "muted": "#020304", "rule": "#030405", "original": "#040506", "converted": "#050607"}
INK, MUTED, RULE, ORIGINAL, CONVERTED = STAND_INS.values()
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lineate",  # the same run gives the same page
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 12,
    "text.color": MUTED,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
}


def _inline(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element: no outside names, ids of its own, the page's colours and font, and a description."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body).replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    for variable, colour in STAND_INS.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg {box.group()} role="img" aria-label="{escape(description)}">{body}'


def _both(name: str, description: str, height_px: float, draw: Callable[[Axes, int], None]) -> Markup:
    """The chart in both widths; `draw` fills the axes, told the width in px."""
    shown = []
    for kind, width_px in (("wide", WIDE_PX), ("narrow", NARROW_PX)):
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(width_px / 72, height_px / 72), layout="constrained")
            draw(figure.subplots(), width_px)
            shown.append(f'<div class="chart {kind}">{_inline(figure, f"{name}-{kind}", description)}</div>')
    return Markup("".join(shown))  # matplotlib escapes text, _inline the description, and names are ours


def latency(cost: Cost) -> Markup:
    """Median time of a forward pass against image size, both models, with interquartile bands and the crossover. Log-log."""
    rows = sorted(cost.rows, key=lambda row: row.side_px)
    sides = [row.side_px for row in rows]

    def draw(axes: Axes, width_px: int) -> None:
        axes.set(xscale="log", yscale="log")
        for colour, marker, middle, spread in (
            (ORIGINAL, "s", [row.original_ms for row in rows], [row.original_iqr_ms for row in rows]),
            (CONVERTED, "o", [row.converted_ms for row in rows], [row.converted_iqr_ms for row in rows]),
        ):
            low = [max(m - s / 2, m / 100) for m, s in zip(middle, spread, strict=True)]
            high = [m + s / 2 for m, s in zip(middle, spread, strict=True)]
            axes.fill_between(sides, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(sides, middle, color=colour, marker=marker, markersize=5, linewidth=2)
        if cost.crossover_px is not None:
            _mark(axes, cost.crossover_px, sides)
        axes.xaxis.set(major_locator=FixedLocator(_spread_out(sides, width_px)), minor_locator=NullLocator())
        names = {row.side_px: _size(row) for row in rows}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, f"{x:.0f}")))
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=20), minor_locator=NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("image size, px")
        axes.set_title("forward pass, ms", loc="left", fontsize=12)

    ends = f"{number(rows[-1].original_ms)} ms original, {number(rows[-1].converted_ms)} ms converted at {pixels(rows[-1])} px"
    return _both("latency", f"Time of a forward pass against image size: {ends}. {sentence(cost.crossover_note)}", 330, draw)


def _mark(axes: Axes, crossover_px: float, sides: Sequence[float]) -> None:
    """A dashed line at the crossover, its label on the side with more room."""
    left = crossover_px < math.sqrt(sides[0] * sides[-1])
    axes.axvline(crossover_px, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate(
        f"crossover {crossover_px:.0f} px", (crossover_px, 1), (6 if left else -6, -4), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="left" if left else "right", va="top", color=INK,
    )  # fmt: skip


def _size(row: CostRow) -> str:
    return str(row.height) if row.height == row.width else f"{row.height}×{row.width}"


def _spread_out(sides: Sequence[float], width_px: int) -> list[float]:
    """Those of the ascending sides that leave room for their labels on a log axis; the last always."""
    if len(sides) < 2 or sides[0] == sides[-1]:
        return list(sides[-1:])
    apart = math.log(sides[-1] / sides[0]) * 48 / width_px
    kept = [sides[-1]]
    for side in reversed(sides[:-1]):
        if math.log(kept[-1] / side) >= apart:
            kept.append(side)
    return kept


def site_labels(names: Sequence[str]) -> tuple[list[str], str]:
    """Site names without the parts they share, and the pattern that is left: blocks.0.attn, ... -> 0, ... and blocks.*.attn."""
    parts = [name.split(".") for name in names]
    short = min(len(part) for part in parts)
    start = next((i for i in range(short) if len({part[i] for part in parts}) > 1), short)
    stop = next((i for i in range(short - start) if len({part[-1 - i] for part in parts}) > 1), 0)
    if start == short or len(set(names)) < 2:
        return list(names), "site"
    labels = [".".join(part[start : len(part) - stop]) for part in parts]
    return labels, ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - stop :]])


def site_errors(before: Mapping[str, float], after: Mapping[str, float]) -> Markup:
    """Relative error of each site's output, a ring before calibration and a disc after; `before` may be empty."""
    sites = list(after)
    known = [error for error in (*before.values(), *after.values()) if math.isfinite(error)]
    wide_range = bool(known) and max(known) > 20 * min(known) > 0

    def draw(axes: Axes, _: int) -> None:
        if wide_range:
            axes.set_xscale("log")
            subs = (1, 3) if max(known) < 300 * min(known) else (1,)
            axes.xaxis.set(major_locator=LogLocator(subs=subs, numticks=6), minor_locator=NullLocator())
        rows = [i for i, site in enumerate(sites) if site in before]
        olds = [before[sites[i]] for i in rows]
        axes.hlines(rows, olds, [after[sites[i]] for i in rows], color=RULE, linewidth=2)
        axes.plot(olds, rows, "o", markersize=7, markerfacecolor="none", markeredgecolor=ORIGINAL, markeredgewidth=1.6)
        axes.plot(list(after.values()), range(len(sites)), "o", markersize=7, color=CONVERTED)
        _finish(axes, sites, "relative error, logarithmic" if wide_range else "relative error", from_zero=not wide_range)

    pairs = [f"{s} {number(before[s])} to {number(e)}" if s in before else f"{s} {number(e)}" for s, e in after.items()]
    said = f"Relative error of each site’s output{', before calibration to after' if before else ''}: {'; '.join(pairs)}"
    return _both("errors", said, _tall(sites), draw)


def key_shift(ratios: Mapping[str, float]) -> Markup:
    """Key-shift ratio of each site, on a scale from 0 to 1."""
    sites = list(ratios)

    def draw(axes: Axes, _: int) -> None:
        axes.hlines(range(len(sites)), 0, list(ratios.values()), color=RULE, linewidth=2)
        axes.plot(list(ratios.values()), range(len(sites)), "s", markersize=6, color=ORIGINAL)
        axes.set_xlim(0, 1.02)
        _finish(axes, sites, "key-shift ratio", from_zero=True)

    said = "; ".join(f"{site} {number(ratio)}" for site, ratio in ratios.items())
    return _both("shift", f"Key-shift ratio of each site: {said}", _tall(sites), draw)


def _tall(sites: Sequence[str]) -> float:
    return 21 * len(sites) + 70


def _finish(axes: Axes, sites: Sequence[str], label: str, *, from_zero: bool) -> None:
    """One row a site, the first on top."""
    labels, pattern = site_labels(sites)
    axes.set_yticks(range(len(sites)), [label if len(label) < 24 else f"…{label[-22:]}" for label in labels])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    if from_zero:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    axes.set_title(pattern, loc="left", fontsize=12)
