"""Signals of a scan: the chain of recovery, saturation and readout on the longitudinal magnetisation.

Transverse magnetisation is spoiled before every saturation block and before every readout. A block is then an affine map of the
longitudinal magnetisations, computed once per distinct pulse, and a scan is a short chain of small products. Arrays have the
cells (grid points, voxels) as last axis. Magnetisation is in units of water's equilibrium.

Under one long constant pulse far from water's resonance, water precesses about its effective field, and Mz oscillates by the square of the field's
tilt until T2 has damped it: at 3 ppm and 9.4 T, where T2 is a second, by 1 % of M0 at the end of half a second and by 0.2 % after three. Where in its
turn it ends hangs on 0.001 ppm of B0. A voxel whose B0 differs by more than that reads the mean over the turn (`Tissue.dephases`); one spin reads
the oscillation. Nearer to water than the pulse's own amplitude B0 hardly changes the effective field, and a voxel is taken for a spin.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scansteer.core import bloch_mcconnell as bm
from scansteer.core import rational_exponential as rational
from scansteer.core import two_pool
from scansteer.core.chunks import mapped
from scansteer.core.saturation import Saturation, Train
from scansteer.core.tissue import Tissue

GAMMA = 267.5153e6
"""Proton gyromagnetic ratio [rad/s/T], the value used by pulseq-cest."""
CHUNK = 512
"""Cells simulated at a time; bounds the memory, and the closed forms run best with a few hundred."""
CACHED_CELLS = 256
"""Cells whose matrices are multiplied at a time: they stay in a core's cache."""
NEGLIGIBLE_PRECESSION = 1e-6
"""Fraction of M0."""
GAUSS_STEPS = 64
"""Constant steps that stand in for a Gaussian pulse."""
GAUSS_SIGMA = 1 / 6
"""Standard deviation of a Gaussian pulse over its length: it is cut at three."""


class LongitudinalMap(eqx.Module):
    """Mz -> matrix @ Mz + shift over one recovery + saturation block (transverse magnetisation spoiled before and after)."""

    matrix: Float[Array, "pool pool *cell"]
    shift: Float[Array, "pool *cell"]
    """Pool 0 is water, then tissue.pools in order; Mz in units of water's equilibrium."""

    def __call__(self, mz: Float[Array, "pool *cell"]) -> Float[Array, "pool *cell"]:
        return bm.apply(self.matrix, mz) + self.shift


class Readout(eqx.Module):
    """What one image does to the longitudinal magnetisation and how it reads it."""

    flip_angle: Float[Array, ""]
    """Nominal flip angle of each shot [rad]; the tissue's relative B1 scales it."""
    shot_spacing: Float[Array, ""]
    """Time from shot to shot [s]; matters with more than one shot."""
    carry_over: Float[Array, "..."] | None = None
    """Share of every pool's Mz that the whole readout leaves, scalar or per cell; none: follows from the flips."""
    n_shots: int = eqx.field(static=True, default=1)
    encoded_shot: int = eqx.field(static=True, default=0)
    """Index of the shot that reads the centre of k-space."""


class ReadoutMap(eqx.Module):
    """What is read from Mz before the readout, and what the readout leaves of it."""

    weight: Float[Array, "pool *cell"]
    offset: Float[Array, "*cell"]
    leave: LongitudinalMap
    """From Mz before the first to Mz after the last shot."""

    def signal(self, mz: Float[Array, "pool *cell"]) -> Float[Array, "*cell"]:
        """Mz of water at the encoded shot: the signal per unit amplitude (sin(flip) belongs to the amplitude)."""
        return jnp.sum(self.weight * mz, axis=0) + self.offset


def equilibrium(tissue: Tissue) -> Float[Array, "pool *cell"]:
    """Longitudinal equilibrium: 1 for water, the volume fraction for a pool."""
    return bm.equilibrium(tissue)


def saturation_map(tissue: Tissue, saturation: Saturation, train: Train) -> LongitudinalMap:
    """The map of Mz over one block: free recovery for t_rec, then saturation for t_sat.

    Parameters
    ----------
    tissue
        Leaves of one shape (*cell), or broadcasting with it.
    saturation
        Traced scalars: one compilation serves every pulse. b1 = 0 is free precession for t_sat; t_rec = 0 skips the recovery.
    train
        How t_sat is filled with RF; static.
    """
    return _in_chunks(lambda cells, *_: _block(cells, saturation, train, _intervals(cells, saturation, train)), tissue)


def readout_map(tissue: Tissue, readout: Readout) -> ReadoutMap:
    """What the readout reads and leaves.

    One shot leaves the share `carry_over` of every pool's Mz, by default cos(relative B1 x flip angle). With more shots each turns the
    water by the flip angle and is spoiled (a semisolid is too short-lived, a solute too far off resonance to follow), and all pools relax and
    exchange in between; the time (n_shots - 1) x shot_spacing passes here. A given `carry_over` replaces what such a train leaves.
    """
    return _in_chunks(lambda cells, carry_over, _: _readout(cells, _with_carry_over(readout, carry_over)), tissue, readout.carry_over)


def signals(
    tissue: Tissue,
    saturations: Saturation,
    train: Train,
    readout: Readout,
    initial: Float[Array, "pool *cell"],
    index: Array | None = None,
) -> Float[Array, "image *cell"]:
    """Signals of a sequence of images, the magnetisation carried from each to the next.

    Parameters
    ----------
    tissue
        Leaves of one shape (*cell), or broadcasting with it.
    saturations
        Leaves with a leading axis: one entry per distinct pulse.
    train, readout
        The same for all images.
    initial
        Mz before the first block.
    index
        Place in `saturations` of each image's pulse, shape (image,); none: every entry is played once, in order.
    """
    order = jnp.arange(saturations.b1.shape[0]) if index is None else jnp.asarray(index)

    def chunk(cells, carry_over, initial):
        return _chain(_blocks(cells, saturations, train), _readout(cells, _with_carry_over(readout, carry_over)), initial, order)

    return _in_chunks(chunk, tissue, readout.carry_over, initial)


def _as_longitudinal(map: bm.Affine) -> LongitudinalMap:
    return LongitudinalMap(map.matrix, map.shift)


def _chain(blocks, reading, initial, order):
    def image(mz, number):
        mz = jax.tree.map(lambda leaf: leaf[number], blocks)(mz)
        return reading.leave(mz), reading.signal(mz)

    return lax.scan(image, initial, order)[1]


def _with_carry_over(readout, carry_over):
    return Readout(readout.flip_angle, readout.shot_spacing, carry_over, readout.n_shots, readout.encoded_shot)


class _Intervals(NamedTuple):
    """Times without RF and what they do; the same for most pulses of a schedule, and kept from one to the next."""

    t_rec: Array
    t_sat: Array
    recovery: bm.Affine
    pause: bm.Affine | None


def _intervals(tissue, saturation, train) -> _Intervals:
    pause = bm.free(tissue, _timing(saturation, train)[1]) if train.n_pulses > 1 else None
    return _Intervals(saturation.t_rec, saturation.t_sat, bm.free_longitudinal(tissue, saturation.t_rec), pause)


def _timing(saturation, train) -> tuple[Array, Array]:
    """Length of a pulse and of the pause between two [s]."""
    n = train.n_pulses
    length = saturation.t_sat / (n + (n - 1) * (1 / train.duty_cycle - 1))
    return length, (saturation.t_sat - n * length) / max(n - 1, 1)


def _blocks(tissue, saturations, train) -> LongitudinalMap:
    """The maps of all pulses, along a leading axis."""

    def one(kept, saturation):
        same = (kept.t_rec == saturation.t_rec) & (kept.t_sat == saturation.t_sat)
        kept = lax.cond(same, lambda: kept, lambda: _intervals(tissue, saturation, train))
        return kept, _block(tissue, saturation, train, kept)

    first = jax.tree.map(lambda leaf: leaf[0], saturations)
    return lax.scan(one, _intervals(tissue, first, train), saturations)[1]


def _block(tissue, saturation, train, kept: _Intervals) -> LongitudinalMap:
    played = _saturation(tissue, saturation, train, kept.pause)
    return _as_longitudinal(bm.then(kept.recovery, played))


def _saturation(tissue, saturation, train, pause) -> bm.Affine:
    """The map of Mz over the RF, by the closed form where there is one."""
    is_constant = train.n_pulses == 1 and train.shape == "block" and not train.spin_lock
    dephases = tissue.dephases and is_constant
    general = lambda: _mean_over_turn(tissue, saturation) if dephases else _saturation_in_general(tissue, saturation, train, pause)  # noqa: E731
    if not is_constant or len(tissue.pools) != 1 or tissue.pools[0].lineshape != "bloch":
        return general()
    (pool,) = tissue.pools
    x = two_pool.scaled(tissue, GAMMA * saturation.b1 * tissue.b1, 2 * math.pi * saturation.offset_hz, saturation.t_sat)
    sources = saturation.t_sat / tissue.t1, saturation.t_sat * pool.f / pool.t1
    quick, trusted = two_pool.longitudinal(x, sources, _is_far(saturation) if dephases else False)
    return lax.cond(trusted, lambda: quick, general)


def _is_far(saturation) -> Array:
    """Whether a pulse is so far from water, and so long, that precession about the effective field dephases: the same for all cells."""
    w1, offset = GAMMA * saturation.b1, 2 * math.pi * saturation.offset_hz
    return (jnp.abs(offset) > w1) & (jnp.hypot(w1, offset) * saturation.t_sat > rational.FAR)


def _mean_over_turn(tissue, saturation) -> bm.Affine:
    """One constant pulse: the mean of two that end half a turn of water about its effective field apart, weighted as T2 damps them.

    Not where nothing is left of the precession.
    """
    n = bm.n_transverse(tissue)

    def longitudinal(cells):
        (own,) = cells
        w1, offset, t_sat = GAMMA * saturation.b1 * own.b1, 2 * math.pi * saturation.offset_hz, saturation.t_sat
        field = jnp.maximum(jnp.hypot(w1, offset - 2 * math.pi * own.b0_hz), 1.0)
        tilt = (w1 / field) ** 2
        rate = (1 - 0.5 * tilt) / own.t2 + 0.5 * tilt / own.t1
        averages = _is_far(saturation) & (tilt * jnp.exp(-t_sat * rate) > NEGLIGIBLE_PRECESSION)
        half_turn = jnp.where(averages, math.pi / field, 0.0)
        share = 1 / (1 + jnp.exp(rate * half_turn))  # of the earlier one; their mean time is that of the pulse
        generator = bm.generator(own, w1, offset)

        def averaged() -> bm.Affine:
            early = bm.propagate(*generator, t_sat - (1 - share) * half_turn)
            late = bm.then(early, bm.propagate(*generator, half_turn))
            return jax.tree.map(lambda one, other: share * one + (1 - share) * other, early, late)

        mean = lax.cond(jnp.any(averages), averaged, lambda: bm.propagate(*generator, t_sat))
        return bm.Affine(mean.matrix[2 * n :, 2 * n :], mean.shift[2 * n :])

    return mapped(longitudinal, (tissue,), CACHED_CELLS)


def _saturation_in_general(tissue, saturation, train, pause) -> bm.Affine:
    n = bm.n_transverse(tissue)

    def longitudinal(cells):
        own, pause = cells
        played = _train(own, pause, saturation, train)
        return bm.Affine(played.matrix[2 * n :, 2 * n :], played.shift[2 * n :])

    return mapped(longitudinal, (tissue, pause), CACHED_CELLS)


def _train(tissue, pause, saturation, train) -> bm.Affine:
    """Pulses with free precession between them, as one map of the full state.

    The frame follows the RF during pulses and water's nominal frequency between them: the next pulse continues the phase.
    """
    pulse = _pulse(tissue, saturation, train, _timing(saturation, train)[0])
    tip = back = ()
    if train.spin_lock:
        offset = 2 * math.pi * saturation.offset_hz
        angle = jnp.arctan2(GAMMA * saturation.b1, jnp.abs(offset)) * jnp.where(offset < 0, -1.0, 1.0) * tissue.b1
        tip, back = (bm.turn(tissue, angle),), (bm.turn(tissue, -angle),)
    once = bm.chain(*tip, pulse, *back)
    return once if pause is None else bm.then(bm.power(bm.then(once, pause), train.n_pulses - 1), once)


def _pulse(tissue, saturation, train, length) -> bm.Affine:
    w1, offset = GAMMA * saturation.b1 * tissue.b1, 2 * math.pi * saturation.offset_hz
    if train.shape == "gauss":
        return _gauss(tissue, w1, offset, length)
    return bm.propagate(*bm.generator(tissue, w1, offset), length)


def _gauss(tissue, w1, offset, length) -> bm.Affine:
    """A Gaussian pulse of rms amplitude `w1`, in constant steps."""
    place = (jnp.arange(GAUSS_STEPS) + 0.5) / GAUSS_STEPS - 0.5
    envelope = jnp.exp(-0.5 * (place / GAUSS_SIGMA) ** 2)
    envelope = envelope / jnp.sqrt(jnp.mean(envelope**2))

    def step(total, amplitude):
        return bm.then(total, bm.propagate(*bm.generator(tissue, w1 * amplitude, offset), length / GAUSS_STEPS)), None

    size, shape = 2 * bm.n_transverse(tissue) + 1 + len(tissue.pools), bm.cell_shape(tissue)
    return lax.scan(step, bm.identity(size, shape), envelope)[0]


def _readout(tissue, readout) -> ReadoutMap:
    shape = bm.cell_shape(tissue)
    count = 1 + len(tissue.pools)
    nothing = bm.identity(count, shape)
    cosine = jnp.broadcast_to(jnp.cos(readout.flip_angle * tissue.b1), shape)
    if readout.n_shots == 1:
        encode, leave = nothing, bm.Affine(nothing.matrix * cosine, nothing.shift)
    else:
        flip = bm.Affine(nothing.matrix.at[0, 0].set(cosine), nothing.shift)
        shot = bm.then(flip, bm.free_longitudinal(tissue, readout.shot_spacing))
        encode = bm.power(shot, readout.encoded_shot) if readout.encoded_shot else nothing
        leave = bm.then(bm.power(shot, readout.n_shots - 1), flip)
    if readout.carry_over is not None:
        leave = bm.Affine(nothing.matrix * readout.carry_over, nothing.shift)
    return ReadoutMap(encode.matrix[0], encode.shift[0], LongitudinalMap(leave.matrix, leave.shift))


def _in_chunks(function, tissue: Tissue, scalars=None, vectors=None):
    """`function(cells, scalars, vectors)` over chunks of cells.

    Leaves of `tissue` and `scalars` broadcast with (*cell), those of `vectors` with (pool, *cell).
    """
    leaves = jax.tree.leaves
    shape = jnp.broadcast_shapes(
        bm.cell_shape(tissue), *map(jnp.shape, leaves(scalars)), *(jnp.shape(leaf)[1:] for leaf in leaves(vectors))
    )

    def flat(leaf, lead=()):
        leaf = jnp.asarray(leaf)
        missing = (1,) * (len(lead) + len(shape) - leaf.ndim)
        return jnp.broadcast_to(leaf.reshape(lead + missing + leaf.shape[len(lead) :]), lead + shape).reshape((*lead, -1))

    per_cell = jax.tree.map(flat, (tissue, scalars))
    cells = (*per_cell, jax.tree.map(lambda leaf: flat(leaf, leaf.shape[:1]), vectors))
    result = mapped(lambda cells: jax.checkpoint(function)(*cells), cells, CHUNK)
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[:-1] + shape), result)
