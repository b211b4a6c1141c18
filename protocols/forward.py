"""From a `Scan` to the arrays that the reference posterior works with: nuisance axes, forward model, prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from scansteer.core import grid_posterior, lattice, nuisance, predictive
from scansteer.core.dictionary import Forward
from scansteer.core.grid_posterior import Prior
from scansteer.core.nuisance import Axis
from scansteer.protocols import tissue_model
from scansteer.protocols.scan import Range, Scan, bounds


class Model(NamedTuple):
    """A scan, ready to be simulated and inverted."""

    chain_axes: tuple[Axis, ...]
    tissue_axes: tuple[Axis, ...]
    forward: Forward

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.chain_axes + self.tissue_axes


def model(scan: Scan, n_slices: int = 1) -> Model:
    """Assemble the arrays; nothing is simulated yet. Ranges of nuisances are cut into `n_slices` (core.nuisance)."""
    chain, tissue = (tuple(axis._replace(n_slices=n_slices) for axis in axes) for axes in (chain_axes(scan), tissue_axes(scan)))
    return Model(chain, tissue, simulated(scan, (chain, nuisance.tensor_nodes(chain)), (tissue, nuisance.tensor_nodes(tissue))))


def prior(scan: Scan, n_points: tuple[int, int]) -> Prior:
    """The scan's prior on a lattice of so many points along f and along k."""
    fraction, rate = scan.parameters.values()
    lower, upper = jnp.array([fraction.lower, rate.lower]), jnp.array([fraction.upper, rate.upper])
    return grid_posterior.make_prior(lower, upper, n_points, (fraction.prior, rate.prior))


def coarse(scan: Scan, at_most: int = 3, n_points: int = predictive.N_POINTS) -> tuple[predictive.Star, Forward]:
    """The star of nuisance nodes (at most so many per axis) and the coarse points at which candidates are simulated."""
    star = predictive.star(chain_axes(scan), tissue_axes(scan), at_most)
    n_chain = star.chain.shape[1]
    return star, simulated(scan, (star.axes[:n_chain], star.chain), (star.axes[n_chain:], star.tissue), n_points)


Nodes = tuple[Sequence[Axis], np.ndarray]
"""Axes, and their values (node, axis)."""


def simulated(scan: Scan, chain: Nodes, tissue: Nodes, n_points: int = lattice.N_NODES) -> Forward:
    """What signals are simulated from: every node of the chain and of the tissue, at `n_points` x `n_points` points over the box."""
    sides = (lattice.node_values(parameter.lower, parameter.upper, n_points) for parameter in scan.parameters.values())
    grid = np.meshgrid(*sides, indexing="ij")
    values: dict[str, np.ndarray] = {name: each.reshape(1, -1) for name, each in zip(scan.parameter_names, grid, strict=True)}
    axes, nodes = tissue
    values |= {axis.name: nodes[:, j, None] for j, axis in enumerate(axes)}
    shape = (len(nodes), grid[0].size)
    described = tissue_model.tissue(scan, {name: jnp.asarray(np.broadcast_to(value, shape)) for name, value in values.items()}, voxels=True)
    axes, nodes = chain
    at = {axis.name: nodes[:, j] for j, axis in enumerate(axes)}
    carry, mz = scan.readout.carry_over, scan.first_state.mz
    return Forward(
        tissue=described,
        train=tissue_model.train(scan),
        readout=tissue_model.readout(scan),
        carry_over=None if carry is None else jnp.asarray(at.get("carry_over", np.full(len(nodes), bounds(carry)[0]))),
        first_mz=jnp.asarray(at.get("first_mz", np.full(len(nodes), bounds(mz)[0]))),
    )


def tissue_axes(scan: Scan) -> tuple[Axis, ...]:
    """Nuisances of tissue and field with a range; a range of no width is a constant."""
    described: dict[str, Range] = {name: span for name, span in scan.auxiliaries.items()}  # noqa: C416 - widens the type
    described |= {tissue_model.pool_t2_name(pool): pool.t2_s for pool in scan.pools if isinstance(pool.t2_s, Range)}
    has_solute = any(pool.kind == "solute" for pool in scan.pools)  # saturated at its own offset, where the slope with B0 vanishes
    axes = (_axis(name, span) for name, span in described.items() if span.upper > span.lower)
    return tuple(axis._replace(curved=axis.curved or (has_solute and axis.name == "b0_ppm")) for axis in axes)


def chain_axes(scan: Scan) -> tuple[Axis, ...]:
    """Nuisances of the chain of images: what a readout leaves (polynomial of low degree), and the first state (exactly linear)."""
    axes = []
    if isinstance(scan.readout.carry_over, Range) and scan.readout.carry_over.upper > scan.readout.carry_over.lower:
        axes.append(Axis("carry_over", scan.readout.carry_over.lower, scan.readout.carry_over.upper, n_nodes=3, times="t1_s"))
    if isinstance(scan.first_state.mz, Range) and scan.first_state.mz.upper > scan.first_state.mz.lower:
        axes.append(Axis("first_mz", scan.first_state.mz.lower, scan.first_state.mz.upper, n_nodes=2, times="t1_s"))
    return tuple(axes)


def _axis(name: str, span: Range) -> Axis:
    if name.endswith("_s") and span.lower > 0:  # relaxation times: log scale, more nodes for wider ranges
        octaves = np.log2(span.upper / span.lower)
        n_nodes = 3 if octaves < 0.7 else 4 if octaves < 2 else 5
        # signals bend with T1 and T2: over more than an octave a straight line is not enough
        return Axis(name, span.lower, span.upper, n_nodes, logarithmic=True, curved=octaves > 1)
    return Axis(name, span.lower, span.upper, n_nodes=3)
