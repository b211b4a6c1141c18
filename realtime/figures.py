"""The pictures of a report: SVG text or PNG bytes. Volume fractions are drawn in percent, rates in 1/s."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from scansteer.protocols.scan import SaturationBlock
from scansteer.realtime.messages import Decision, RegionReport
from scansteer.realtime.retrospective import Comparison, Course

INK = "#333333"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the regions in turn (Okabe and Ito: told apart by colour-blind eyes)."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "scansteer",
}


def label(parameter: str, *, is_fraction: bool) -> str:
    """How a parameter is called on an axis."""
    return f"{parameter} [%]" if is_fraction else f"{parameter} [1/s]"


def scale(*, is_fraction: bool) -> float:
    """Factor from stored to drawn values."""
    return 100.0 if is_fraction else 1.0


def parameter_maps(maps: Mapping[str, np.ndarray], parameters: Sequence[str]) -> bytes:
    """PNG: for each parameter its MAP estimate and the relative half-width of its 95 % interval; then the NRMSE.

    Parameters
    ----------
    maps
        `NAME_map`, `NAME_lower`, `NAME_upper` and `nrmse`, shape (z, y, x), NaN outside the region.
    parameters
        Names, the fraction first.
    """
    panels = list(_map_panels(maps, parameters))
    z = _fullest_slice(panels[0][1])
    rows, columns = _window(panels[0][1][z])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.45 * len(panels), 2.5), layout="constrained")
        for axes, (title, values, colours) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            _draw_map(figure, axes, title, values[z][rows, columns], colours)
        return _png(figure)


def area_over_images(decisions: Sequence[Decision]) -> str:
    """SVG: area of the 95 % confidence region, median and 90th percentile of each region's voxels, against n."""

    def draw(axes: Axes) -> None:
        for colour, name in zip(_cycle(decisions), _region_names(decisions), strict=True):
            median = _series(decisions, name, lambda region: region.cr_area_median)
            upper = _series(decisions, name, lambda region: region.cr_area_p90)
            numbers = _numbers(decisions)
            axes.plot(numbers, median, color=colour, marker="o", markersize=3, label=f"{name}: median")
            axes.plot(numbers, upper, color=colour, linestyle="--", linewidth=1, label=f"{name}: 90th percentile")
        if any(line.get_ydata().size and np.isfinite(line.get_ydata()).any() for line in axes.lines):  # type: ignore[union-attr]
            axes.set_yscale("log")
        axes.set_ylabel("area of the 95 % CR [f x 1/s]")
        axes.legend(fontsize=8)

    return _over_images(decisions, draw)


def parameter_over_images(decisions: Sequence[Decision], parameter: str, *, is_fraction: bool) -> str:
    """SVG: median estimate of each region with the medians of its 95 % interval's ends, against n."""
    factor = scale(is_fraction=is_fraction)

    def draw(axes: Axes) -> None:
        for colour, name in zip(_cycle(decisions), _region_names(decisions), strict=True):
            median, lower, upper = (
                factor * _series(decisions, name, lambda region, field=field: getattr(region.parameters[parameter], field))
                for field in ("median", "ci_lower", "ci_upper")
            )
            axes.fill_between(_numbers(decisions), lower, upper, color=colour, alpha=0.16, linewidth=0)
            axes.plot(_numbers(decisions), median, color=colour, marker="o", markersize=3, label=name)
        axes.set_ylabel(label(parameter, is_fraction=is_fraction))
        axes.legend(fontsize=8)

    return _over_images(decisions, draw)


def halfwidth_over_images(decisions: Sequence[Decision], parameters: Sequence[str]) -> str:
    """SVG: relative half-width of the 95 % interval, median over each region's voxels, against n."""

    def draw(axes: Axes) -> None:
        for colour, name in zip(_cycle(decisions), _region_names(decisions), strict=True):
            for parameter, line in zip(parameters, ("-", "--"), strict=False):
                values = _series(decisions, name, lambda region, p=parameter: region.parameters[p].ci_halfwidth_relative)
                axes.plot(_numbers(decisions), 100 * values, color=colour, linestyle=line, label=f"{name}: {parameter}")
        axes.set_ylabel("CI half-width [% of the estimate]")
        axes.set_ylim(0, 200)
        axes.legend(fontsize=8)

    return _over_images(decisions, draw)


def latency_over_images(decisions: Sequence[Decision]) -> str:
    """SVG: time from an image's arrival to its decision, by part, against n."""

    def draw(axes: Axes) -> None:
        bottom = np.zeros(len(decisions))
        for part, colour in (("receive", "#bbbbbb"), ("update", COLOURS[0]), ("decide", COLOURS[4])):
            heights = np.array([getattr(decision.latency_ms, part) for decision in decisions])
            axes.bar(_numbers(decisions), heights, bottom=bottom, color=colour, label=part, width=0.7)
            bottom += heights
        axes.set_ylabel("latency [ms]")
        axes.legend(fontsize=8, ncols=3)

    return _over_images(decisions, draw)


def courses(comparison: Comparison) -> str:
    """SVG: area, half-width and early-stopping error against n; causal on the left, normalised by the whole scan on the right; pulses below."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 8.8), layout="constrained")
        panels = figure.subplots(5, 2, sharex=True, sharey="row", height_ratios=(3, 3, 3, 1, 1))
        for column, (title, course) in enumerate(_views(comparison)):
            _draw_course(panels[:3, column], course, comparison.parameters)
            _draw_pulses(panels[3:, column], comparison.pulses)
            panels[0, column].set_title(title)
            panels[4, column].set_xlabel("images n")
        texts = "area of the 95 % CR [f x 1/s]", "CI half-width [%]", "error against the last n [%]", "B1 [uT]", "offset\n[ppm]"
        for axes, text in zip(panels[:, 0], texts, strict=True):
            axes.set_ylabel(text)
        panels[4, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def maps_over_images(comparison: Comparison) -> bytes:
    """PNG: maps of both parameters at a few n, a row for each view."""
    rows = [(name, axis, view, course) for axis, name in enumerate(comparison.parameters) for view, course in _views(comparison)]
    rows_at, columns_at = comparison.places.T
    shape = np.ptp(comparison.places, axis=0) + 1
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.9 * len(comparison.shown_at) + 0.9, 1.9 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(comparison.shown_at), squeeze=False)
        for line, (name, axis, view, course) in zip(panels, rows, strict=True):
            last = comparison.causal.on_maps[-1, :, axis]
            top = scale(is_fraction=axis == 0) * 1.5 * float(np.percentile(last, 95))
            for axes, n, values in zip(line, comparison.shown_at, course.on_maps[:, :, axis], strict=True):
                picture = np.full(shape, np.nan)
                picture[rows_at - rows_at.min(), columns_at - columns_at.min()] = scale(is_fraction=axis == 0) * values
                shown = _picture(axes, picture, "viridis", 0.0, max(top, 1e-12))
                axes.set_title(f"n = {n}")
            line[0].set_ylabel(f"{label(name, is_fraction=axis == 0)}\n{view}")
            figure.colorbar(shown, ax=list(line), fraction=0.03, pad=0.01).ax.tick_params(labelsize=8)
        return _png(figure)


def _views(comparison: Comparison) -> list[tuple[str, Course]]:
    return [("causal", comparison.causal), ("by the whole scan", comparison.whole)]


def _draw_course(panels: Sequence[Axes], course: Course, parameters: Sequence[str]) -> None:
    numbers = np.arange(1, len(course.area) + 1)
    panels[0].plot(numbers, course.area, color=COLOURS[0], marker="o", markersize=3)
    panels[0].set_yscale("log")
    with np.errstate(divide="ignore", invalid="ignore"):
        halfwidth = 100 * np.median(course.halfwidth / course.estimate, axis=1)
    for axis, (name, colour) in enumerate(zip(parameters, COLOURS, strict=False)):
        panels[1].plot(numbers, halfwidth[:, axis], color=colour, marker="o", markersize=3, label=name)
        said = f"{name}: {course.bounded[axis]:.0%} within the half-width"
        panels[2].plot(numbers, 100 * course.error[:, axis], color=colour, marker="o", markersize=3, label=said)
    panels[1].set_ylim(0, 150)
    panels[2].set_ylim(0, 150)
    panels[1].legend(fontsize=8)
    panels[2].legend(fontsize=8)


def _draw_pulses(panels: Sequence[Axes], pulses: Sequence[SaturationBlock]) -> None:
    """Amplitudes, and offsets of those with RF, under the image that follows."""
    numbers, amplitudes = np.arange(1, len(pulses) + 1), np.array([pulse.b1_ut for pulse in pulses])
    offsets = np.array([pulse.offset_ppm for pulse in pulses])
    panels[0].bar(numbers, amplitudes, width=0.7, color=INK)
    panels[1].plot(numbers, np.where(amplitudes > 0, offsets, np.nan), color=INK, marker="_", linestyle="none")
    panels[1].axhline(0, color=INK, linewidth=0.5)


def _over_images(decisions: Sequence[Decision], draw: Callable[[Axes], None]) -> str:
    """An SVG whose horizontal axis counts images, with a line where a stop was first called."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel("images n")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        stop = decisions[-1].would_stop_at if decisions else None
        if stop is not None:
            axes.axvline(stop, color=INK, linewidth=1, linestyle=":")
            axes.text(stop + 0.2, 0.98, "stop", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
        return _svg(figure)


def _map_panels(maps: Mapping[str, np.ndarray], parameters: Sequence[str]):
    """(title, values as drawn, colour map) of each panel."""
    for number, parameter in enumerate(parameters):
        value, lower, upper = (np.asarray(maps[f"{parameter}_{kind}"], float) for kind in ("map", "lower", "upper"))
        yield label(parameter, is_fraction=number == 0), value * scale(is_fraction=number == 0), "viridis"
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(value > 0, 50 * (upper - lower) / value, np.nan)
        yield f"CI half-width of {parameter} [%]", np.clip(relative, 0, 100), "magma"
    if "nrmse" in maps:
        yield "NRMSE [%]", 100 * np.asarray(maps["nrmse"], float), "cividis"


def _draw_map(figure: Figure, axes: Axes, title: str, values: np.ndarray, colours: str) -> None:
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [1, 99]) if finite.size else (0.0, 1.0)
    shown = _picture(axes, values, colours, low, high if high > low else low + 1e-12)
    axes.set_title(title)
    figure.colorbar(shown, ax=axes, orientation="horizontal", fraction=0.06, pad=0.03).ax.tick_params(labelsize=8)


def _picture(axes: Axes, values: np.ndarray, colours: str, low: float, high: float) -> AxesImage:
    """Pixels as they are, without a frame; grey where there is no value."""
    axes.set_facecolor("#f2f2f2")
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")


def _fullest_slice(values: np.ndarray) -> int:
    return int(np.argmax(np.isfinite(values).sum(axis=(1, 2))))


def _window(values: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns that hold the region, with a margin of two voxels."""
    known = np.isfinite(values)
    if not known.any():
        return slice(None), slice(None)
    rows, columns = np.flatnonzero(known.any(axis=1)), np.flatnonzero(known.any(axis=0))
    return slice(max(rows[0] - 2, 0), rows[-1] + 3), slice(max(columns[0] - 2, 0), columns[-1] + 3)


def _numbers(decisions: Sequence[Decision]) -> list[int]:
    return [decision.n_images for decision in decisions]


def _region_names(decisions: Sequence[Decision]) -> list[str]:
    return list(dict.fromkeys(region.name for decision in decisions for region in decision.regions))


def _cycle(decisions: Sequence[Decision]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(_region_names(decisions)))]


def _series(decisions: Sequence[Decision], name: str, value: Callable[[RegionReport], float | None]) -> np.ndarray:
    """A region's value at every decision, NaN where it is undefined."""
    found = [next((value(region) for region in decision.regions if region.name == name), None) for decision in decisions]
    return np.array([np.nan if number is None else number for number in found], dtype=float)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
