"""The dictionary: signals at every lattice point and nuisance node, one image at a time, with the pulses really played.

Every simulated point carries its magnetisation from image to image. Nuisance nodes are the tensor product of what concerns the chain of images
(carry-over, first state) and what concerns the tissue (T1, T2, B0, B1, pool T2): a saturation block is simulated once per tissue node and
serves all chain nodes.
"""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scansteer.core import signal as spin
from scansteer.core.saturation import Saturation, Train
from scansteer.core.tissue import Tissue


class Forward(eqx.Module):
    """What a scan's signals are simulated from."""

    tissue: Tissue
    """Leaves broadcast to (tissue node, simulated node of (f, k))."""
    train: Train
    readout: spin.Readout
    """Its `carry_over` is ignored where `carry_over` below is given."""
    carry_over: Float[Array, " chain"] | None
    """Share of every pool's Mz that a readout leaves, at each chain node; none: as the readout's flips say."""
    first_mz: Float[Array, " chain"]
    """Mz before the first block, as a fraction of equilibrium, at each chain node."""


class Magnetisation(eqx.Module):
    """Mz after the latest readout, and whether there was one."""

    mz: Float[Array, "pool chain node point"]


def start(forward: Forward) -> Magnetisation:
    """Before the first block."""
    equilibrium = spin.equilibrium(forward.tissue)
    return Magnetisation(equilibrium[:, None] * forward.first_mz[None, :, None, None])


def block_map(forward: Forward, saturation: Saturation) -> spin.LongitudinalMap:
    """One recovery and saturation of all cells: (pool, pool, tissue node, point)."""
    return spin.saturation_map(forward.tissue, saturation, forward.train)


def reading(forward: Forward) -> spin.ReadoutMap:
    """What one readout reads and leaves; computed once per scan."""
    return spin.readout_map(forward.tissue, forward.readout)


def play(
    forward: Forward, read: spin.ReadoutMap, state: Magnetisation, block: spin.LongitudinalMap
) -> tuple[Magnetisation, Float[Array, "node point"]]:
    """Play one block and read it.

    The new state, and the signals per unit amplitude at every (chain x tissue) node; the last node reads 1 always, for an additive offset.
    """
    mz = jnp.einsum("pqtg,qctg->pctg", block.matrix, state.mz) + block.shift[:, None]
    signal = jnp.sum(read.weight[:, None] * mz, axis=0) + read.offset
    if forward.carry_over is None:
        left = jnp.einsum("pqtg,qctg->pctg", read.leave.matrix, mz) + read.leave.shift[:, None]
    else:
        left = forward.carry_over[:, None, None] * mz
    nodes = signal.reshape(-1, signal.shape[-1])
    return Magnetisation(left), jnp.concatenate([nodes, jnp.ones_like(nodes[:1])])
