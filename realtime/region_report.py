"""What a decision says of each region, from the summaries of its voxels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float

from scansteer.core import stopping
from scansteer.core.grid_posterior import Info
from scansteer.core.region import Summary
from scansteer.core.stopping import Rule
from scansteer.realtime.messages import MeanParameterReport, MeanReport, ParameterReport, RegionReport
from scansteer.realtime.roi import Region

MOST_MOVED = 0.2
"""Share of a region's voxels that may have moved before the region is not what it was."""


class Reporter:
    """Reports on the regions of one session; remembers each region's area at the latest image."""

    def __init__(self, parameters: Sequence[str], rule: Rule) -> None:
        self._parameters = parameters
        self._rule = rule
        self._areas: dict[str, float | None] = {}

    def report(
        self,
        regions: Sequence[Region],
        places: Sequence[np.ndarray],
        info: Info,
        moved: Bool[np.ndarray, " voxel"],
        unexplained: Bool[np.ndarray, " voxel"],
        means: Sequence[MeanReport],
    ) -> tuple[RegionReport, ...]:
        """One report per region.

        Parameters
        ----------
        places
            Each region's voxels among the leaves of `info`.
        moved
            Voxels that are left out, but for a region of which more than `MOST_MOVED` have: there they count as not converged.
        unexplained
            Voxels that do not count as converged, for the model does not describe them.
        """
        summary = info.summary
        halfwidth = stopping.relative_halfwidth(summary.map, summary.lower, summary.upper)
        converged = stopping.converged(self._rule, halfwidth, summary.edge_mass, summary.covariance) & ~moved & ~unexplained
        reports = []
        for region, at, mean in zip(regions, places, means, strict=True):
            share = float(np.mean(moved[at]))
            steady = at[~moved[at]] if share <= MOST_MOVED else at
            said = {
                "n_voxels": len(at),
                "fraction_converged": float(np.mean(converged[steady])),
                "fraction_moved": share,
                "fraction_unexplained": float(np.mean(unexplained[steady])),
                "mean_signal": mean,
            }
            reports.append(self._one(region.name, summary, steady, halfwidth[steady]).model_copy(update=said))
        return tuple(reports)

    def of_means(self, info: Info, n_independent: Sequence[float]) -> list[MeanReport]:
        """What is said of each region's mean signal; leaves of `info` over the regions. Of a mean that is no signal (NRMSE over 1): nothing."""
        is_signal = info.nrmse < 1
        found = jax.tree.map(lambda leaf: np.where(is_signal.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, np.nan), info.summary)
        halfwidth = stopping.relative_halfwidth(found.map, found.lower, found.upper)
        is_limited = stopping.is_prior_limited(self._rule, found.edge_mass)
        is_unidentified = stopping.is_unidentified(self._rule, found.covariance)
        return [
            MeanReport(
                n_independent=behind,
                parameters={
                    parameter: MeanParameterReport(
                        estimate=finite(found.map[number, axis]),
                        ci_lower=finite(found.lower[number, axis]),
                        ci_upper=finite(found.upper[number, axis]),
                        ci_halfwidth_relative=finite(halfwidth[number, axis]),
                        is_prior_limited=bool(is_limited[number, axis]),
                        is_not_identifiable=bool(is_unidentified[number, axis]),
                    )
                    for axis, parameter in enumerate(self._parameters)
                },
                cr_area=finite(found.cr_area[number]),
                nrmse=finite(info.nrmse[number]) if is_signal[number] else None,
            )
            for number, behind in enumerate(n_independent)
        ]

    def _one(self, name: str, summary: Summary, at: np.ndarray, halfwidth: Float[np.ndarray, "voxel 2"]) -> RegionReport:
        """What these voxels' posteriors say; `Reporter.report` fills in the rest."""
        area = finite(np.median(summary.cr_area[at]))
        before, self._areas[name] = self._areas.get(name), area
        limited = np.mean(stopping.is_prior_limited(self._rule, summary.edge_mass[at]), axis=0)
        unidentified = np.mean(stopping.is_unidentified(self._rule, summary.covariance[at]), axis=0)
        parameters = {
            parameter: ParameterReport(
                median=finite(np.median(summary.map[at, axis])),
                ci_lower=finite(np.median(summary.lower[at, axis])),
                ci_upper=finite(np.median(summary.upper[at, axis])),
                ci_halfwidth_relative=finite(np.median(halfwidth[:, axis])),
                fraction_prior_limited=float(limited[axis]),
                fraction_not_identifiable=float(unidentified[axis]),
            )
            for axis, parameter in enumerate(self._parameters)
        }
        return RegionReport(
            name=name,
            n_voxels=len(at),
            parameters=parameters,
            cr_area_median=area,
            cr_area_p90=finite(np.percentile(summary.cr_area[at], 90)),
            cr_shrinkage=area / before if area is not None and before else None,
            anytime_area_median=finite(np.median(summary.anytime_area[at])),
            fraction_converged=0.0,
        )


def finite(value: float | np.floating) -> float | None:
    """None in place of what is undefined."""
    return float(value) if np.isfinite(value) else None
