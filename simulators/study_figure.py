"""The figure of a study, for a person: who needs how many images, and does a stop keep its promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = {"published": "0.45", "random": "tab:orange", "optimised": "tab:blue", "adaptive": "tab:red", "oracle": "tab:green"}


def draw(result: dict[str, Any], curves: dict[str, np.ndarray], path: Path) -> None:
    """Write the PNG."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    areas, images, worlds = figure.subplots(1, 3, width_ratios=(1.2, 0.9, 1.3))
    _areas(areas, curves)
    _images(images, result["schedules"])
    _worlds(worlds, result["worlds"])
    figure.suptitle(f"{result['scan']}: {result['repeats']} phantoms of {result['voxels_per_phantom']} voxels", fontsize=12)
    figure.savefig(path, dpi=130)


def _areas(axes, curves: dict[str, np.ndarray]) -> None:
    for name, curve in curves.items():
        axes.semilogy(np.arange(1, len(curve) + 1), np.exp(curve), color=COLOURS[name], label=name, linewidth=2)
    axes.axhline(np.exp(curves["published"][-1]), color="0.45", linestyle=":", linewidth=1)
    axes.set(xlabel="images", ylabel="area of the 95 % confidence region [f x 1/s]", title="How fast uncertainty falls")
    axes.legend(frameon=False)


def _images(axes, schedules: dict[str, Any]) -> None:
    names = list(schedules)
    needed = [schedules[name]["images_to_target"] for name in names]
    bars = axes.barh(names, needed, color=[COLOURS[name] for name in names])
    axes.bar_label(bars, [f"{schedules[name]['images_to_target']:.1f}  ({schedules[name]['seconds_to_target']:.0f} s)" for name in names], padding=3)
    axes.set(xlim=(0, 1.45 * max(needed)), xlabel="images (scan time)", title="Until as sure as the published\nschedule at its end")
    axes.invert_yaxis()


def _worlds(axes, worlds: dict[str, Any]) -> None:
    names = list(worlds)
    places = np.arange(len(names))
    shares = {
        "stopped, truth inside": [(worlds[name]["stopped"] or 0) - (worlds[name]["stopped_with_truth_outside"] or 0) for name in names],
        "stopped, truth outside": [worlds[name]["stopped_with_truth_outside"] or 0 for name in names],
    }
    left = np.zeros(len(names))
    for (label, each), colour in zip(shares.items(), ("tab:green", "tab:red"), strict=True):
        axes.barh(places, each, left=left, color=colour, label=label)
        left = left + each
    axes.barh(places, 1 - left, left=left, color="0.85", label="never stopped")
    axes.plot([worlds[name]["vetoed"] for name in names], places, "kx", label="vetoed at some image")
    axes.set_yticks(places, names)
    axes.set(xlim=(0, 1), xlabel="share of runs", title="Stops, when the description is wrong")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
