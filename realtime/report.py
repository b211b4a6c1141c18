"""report.html: what a scan said and when, in one file that needs nothing else. Made of decisions, maps and the summary alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from scansteer.realtime import figures
from scansteer.realtime.messages import Decision, MeanParameterReport, MeanReport, ParameterReport, RegionReport
from scansteer.realtime.retrospective import FEWEST_IMAGES, Comparison, TooFewImages

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
       padding: 0 1.2rem; }}
h1 {{ font-size: 1.5rem; font-weight: 600; margin: 0 0 .2rem; }}
h3 {{ font-size: .95rem; font-weight: 600; margin: 1.2rem 0 .4rem; }}
h2 {{ font-size: 1.1rem; font-weight: 600; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }}
p.lead {{ font-size: 1.08rem; margin: .2rem 0 1rem; }}
p.note, figcaption, footer {{ color: #555; font-size: .88rem; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .22rem .7rem; border-bottom: 1px solid #eee; vertical-align: top; }}
th {{ font-weight: 600; border-bottom: 1px solid #bbb; }}
td.text, th.text {{ text-align: left; }}
tr.stop td {{ background: #eaf3ee; }}
.wide {{ overflow-x: auto; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
figure img {{ max-width: 100%; height: auto; }}
ul.warnings {{ background: #fff6e0; border-left: 3px solid #d99a00; margin: 0; padding: .6rem 1rem .6rem 2rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(
    decisions: Sequence[Decision],
    maps: Mapping[str, np.ndarray],
    summary: Mapping[str, Any],
    comparison: Comparison | TooFewImages | None = None,
) -> str:
    """The report as HTML.

    Parameters
    ----------
    decisions
        All decisions of the scan, in order.
    maps
        As they stood after the last image: `NAME_map`, `NAME_lower`, `NAME_upper`, `nrmse`, shape (z, y, x); may be empty.
    summary
        As in summary.json.
    comparison
        The scan looked back upon in two ways, or why it could not be; none: nobody asked.
    """
    title = f"scansteer: {summary.get('scan', 'scan')}"
    parts = [f"<h1>{escape(title)}</h1>", _lead(decisions), _warnings(decisions, summary)]
    if decisions and decisions[0].regions:
        parameters = list(decisions[0].regions[0].parameters)
        parts += [_results(decisions[-1], parameters), _maps(maps, parameters), _curves(decisions, parameters)]
        parts += [_comparison(comparison) if comparison is not None else "", _table(decisions)]
    parts.append(_footer(decisions, summary))
    return _PAGE.format(title=escape(title), body="\n".join(part for part in parts if part))


def stop_sentence(decisions: Sequence[Decision]) -> str:
    """When the scan would have stopped."""
    last = decisions[-1]
    n, planned = last.would_stop_at, last.n_planned
    if n is None:
        return f"No stop was called in {last.n_images} of {planned} images."
    saved = planned - n
    return f"A stop was first called after image {n} of {planned}: {saved} image{'' if saved == 1 else 's'} saved."


def _lead(decisions: Sequence[Decision]) -> str:
    if not decisions:
        return '<p class="lead">No image led to a decision.</p>'
    return f'<p class="lead">{escape(stop_sentence(decisions))}</p>\n<p>Last word: {escape(decisions[-1].reason)}</p>'


def _warnings(decisions: Sequence[Decision], summary: Mapping[str, Any]) -> str:
    """Each warning once, with the image that first brought it."""
    first: dict[str, int | None] = {}
    for decision in decisions:
        for warning in decision.warnings:
            first.setdefault(warning, decision.n_images)
    first = {str(warning): None for warning in summary.get("warnings", ()) if warning not in first} | first
    if not first:
        return ""
    items = (f"<li>{escape(text)}{f' (image {n})' if n is not None else ''}</li>" for text, n in first.items())
    return f'<h2>Warnings</h2>\n<ul class="warnings">{"".join(items)}</ul>'


def _results(last: Decision, parameters: Sequence[str]) -> str:
    voxelwise = _results_table("voxels", parameters, "converged", [_result_cells(region, parameters) for region in last.regions])
    means = [_mean_cells(region.name, region.mean_signal, parameters) for region in last.regions if region.mean_signal is not None]
    of_means = (
        f'<h3>Mean signals</h3>\n<div class="wide">{_results_table("independent voxels", parameters, "NRMSE", means)}</div>\n'
        '<p class="note">The posterior of a voxel that reads the mean of its region: the noise averages out, what was not measured and what the '
        "model is wrong by do not. Where tissues or auxiliary maps differ within a region, it is that of no tissue in particular.</p>"
    )
    return (
        f'<h2>After {last.n_images} images</h2>\n<div class="wide">{voxelwise}</div>\n'
        '<p class="note">Medians over the voxels of a region: joint maximum of the posterior, marginal equal-tailed interval, '
        "its half-width relative to the estimate. Prior-limited: share of voxels whose interval leans on the edge of the allowed "
        "range; they never count as converged.</p>" + (of_means if means else "")
    )


def _results_table(counted: str, parameters: Sequence[str], last: str, rows: Sequence[str]) -> str:
    head = ["<th class='text'>region</th>", f"<th>{counted}</th>"]
    for number, parameter in enumerate(parameters):
        named = escape(figures.label(parameter, is_fraction=number == 0))
        head += [f"<th>{named}</th>", "<th>95 % interval</th>", "<th>half-width</th>", "<th>prior-limited</th>"]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join([*head, f'<th>{last}</th>'])}</tr></thead><tbody>{body}</tbody></table>"


def _result_cells(region: RegionReport, parameters: Sequence[str]) -> str:
    cells = [f"<td class='text'>{escape(region.name)}</td>", f"<td>{region.n_voxels}</td>"]
    for number, parameter in enumerate(parameters):
        report = region.parameters[parameter]
        cells += _parameter_cells(report, report.median, _percent(report.fraction_prior_limited), figures.scale(is_fraction=number == 0))
    return "".join([*cells, f"<td>{_percent(region.fraction_converged)}</td>"])


def _mean_cells(name: str, mean: MeanReport, parameters: Sequence[str]) -> str:
    cells = [f"<td class='text'>{escape(name)}</td>", f"<td>{mean.n_independent:.1f}</td>"]
    for number, parameter in enumerate(parameters):
        report = mean.parameters[parameter]
        cells += _parameter_cells(report, report.estimate, "yes" if report.is_prior_limited else "no", figures.scale(is_fraction=number == 0))
    return "".join([*cells, f"<td>{'-' if mean.nrmse is None else f'{100 * mean.nrmse:.2f} %'}</td>"])


def _parameter_cells(report: ParameterReport | MeanParameterReport, estimate: float | None, prior_limited: str, factor: float) -> list[str]:
    interval = f"{_number(report.ci_lower, factor)} to {_number(report.ci_upper, factor)}"
    return [f"<td>{value}</td>" for value in (_number(estimate, factor), interval, _percent(report.ci_halfwidth_relative), prior_limited)]


def _maps(maps: Mapping[str, np.ndarray], parameters: Sequence[str]) -> str:
    needed = [f"{parameter}_{kind}" for parameter in parameters for kind in ("map", "lower", "upper")]
    if not all(name in maps for name in needed):
        return ""
    picture = base64.b64encode(figures.parameter_maps(maps, parameters)).decode()
    described = f"Maps of {' and '.join(parameters)}, of the relative half-widths of their 95 % intervals, and of the fit's NRMSE"
    several = maps[needed[0]].shape[0] > 1
    note = " The slice with the most voxels is shown." if several else ""
    return (
        "<h2>Maps</h2>\n"
        f'<figure><img src="data:image/png;base64,{picture}" alt="{escape(described)}">'
        f"<figcaption>{escape(described)}. Rows of the stored image run downwards; cut to the region.{note}</figcaption></figure>"
    )


def _curves(decisions: Sequence[Decision], parameters: Sequence[str]) -> str:
    fraction, rate = parameters
    drawn = [
        (figures.area_over_images(decisions), "Area of the joint 95 % confidence region."),
        (figures.halfwidth_over_images(decisions, parameters), "Half-width of the marginal 95 % intervals, median over voxels."),
        (figures.parameter_over_images(decisions, fraction, is_fraction=True), f"{fraction}: medians of estimate and interval."),
        (figures.parameter_over_images(decisions, rate, is_fraction=False), f"{rate}: medians of estimate and interval."),
        (figures.latency_over_images(decisions), "From the arrival of an image to its decision."),
    ]
    figures_html = "".join(_svg_figure(svg, f"{text} Against the number of images.") for svg, text in drawn)
    return f'<h2>Image by image</h2>\n<div class="figures">{figures_html}</div>'


def _comparison(comparison: Comparison | TooFewImages) -> str:
    if isinstance(comparison, TooFewImages):
        return (
            f"{_LOOKING_BACK}\n"
            f'<p class="note">Left out: it takes at least {FEWEST_IMAGES} images that count, and there were {comparison.n_images}.</p>'
        )
    picture = base64.b64encode(figures.maps_over_images(comparison)).decode()
    described = "Estimates at a few numbers of images, as known then and as the published analysis has them"
    curves = _svg_figure(
        figures.courses(comparison),
        f"Area of the 95 % region, half-width of the 95 % intervals and mean absolute difference from the last estimate, over {comparison.n_voxels} "
        "voxels, against the number of images; and the share of (voxel, n = 3 to the last but one) whose difference is within the half-width. Areas "
        "are medians: on the left over all voxels (of several regions: the mean of their medians, by voxels), on the right over those "
        f"{comparison.n_voxels}. Below: amplitude and offset of the saturation before each image.",
    )
    return (
        f"{_LOOKING_BACK}\n"
        '<p class="note">Causal: from the images up to n alone, as decided above. Normalised by the whole scan: the published retrospective '
        "analysis, whose signals are divided by their norm over all images and whose noise is the misfit over all images, with what was not mapped "
        "in the middle of its range. No scanner knows either at image n; its early estimates and narrow intervals could not have been had.</p>\n"
        f'{curves}\n<figure><img src="data:image/png;base64,{picture}" alt="{escape(described)}">'
        f"<figcaption>{escape(described)}.</figcaption></figure>"
    )


_LOOKING_BACK = "<h2>Looking back: causal, and normalised by the whole scan</h2>"


def _svg_figure(svg: str, caption: str) -> str:
    picture = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{picture}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(decisions: Sequence[Decision]) -> str:
    head = ("n", "action", "reason", "converged", "CR area", "fit", "suggested next pulse", "latency [ms]")
    textual = {"action", "reason", "fit", "suggested next pulse"}
    heads = "".join(f"<th{' class=text' if name in textual else ''}>{name}</th>" for name in head)
    rows = "".join(_row(decision) for decision in decisions)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>Decisions</h2>\n<div class="wide">{table}</div>'


def _row(decision: Decision) -> str:
    least = min((region.fraction_converged for region in decision.regions), default=None)
    areas = [region.cr_area_median for region in decision.regions if region.cr_area_median is not None]
    pulse = decision.next_pulse
    suggested = f"{pulse.b1_ut:g} uT, {pulse.offset_ppm:g} ppm, {pulse.t_sat_s:g} s after {pulse.t_rec_s:g} s" if pulse else "-"
    fit = "passed" if decision.lack_of_fit.passed else "failed"
    known = [value for value in (decision.lack_of_fit.statistic, decision.lack_of_fit.prediction) if value is not None]
    fit += f" ({', '.join(f'{value:.3g}' for value in known)})" if known else ""
    fit += f", {decision.lack_of_fit.outside} beyond its range" if decision.lack_of_fit.outside else ""
    cells = (
        f"<td>{decision.n_images}</td><td class=text>{decision.action}</td><td class=text>{escape(decision.reason)}</td>"
        f"<td>{_percent(least)}</td><td>{_number(max(areas, default=None))}</td><td class=text>{fit}</td>"
        f"<td class=text>{suggested}</td><td>{decision.latency_ms.total:.0f}</td>"
    )
    return f"<tr{' class=stop' if decision.action == 'stop' else ''}>{cells}</tr>"


def _footer(decisions: Sequence[Decision], summary: Mapping[str, Any]) -> str:
    facts = []
    latency = summary.get("latency_ms")
    if latency:
        facts.append(f"decision latency {latency['p50']:.0f} ms (median), {latency['p99']:.0f} ms (99th percentile)")
    if summary.get("ready_s") is not None:
        facts.append(f"ready after {summary['ready_s']:.1f} s")
    if summary.get("nrmse_median") is not None:
        facts.append(f"median NRMSE {100 * summary['nrmse_median']:.2f} %")
    if decisions:
        facts.append(f"posterior: {decisions[-1].posterior_source}")
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    return f"<footer><p>{escape('; '.join(facts))}</p>\n<p>{escape(versions)}</p></footer>"


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
