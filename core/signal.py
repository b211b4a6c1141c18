"""Signals of a scan: the chain of recovery, saturation and readout on the longitudinal magnetisation.

Transverse magnetisation is spoiled before every saturation block and before every readout. A block is then an affine map of the
longitudinal magnetisations, computed once per distinct pulse, and a scan is a short chain of small products. Arrays have the
cells (grid points, voxels) as last axis. Magnetisation is in units of water's equilibrium.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scansteer.core import bloch_mcconnell as bm
from scansteer.core.saturation import Saturation, Train
from scansteer.core.tissue import Tissue

GAMMA = 267.5153e6
"""Proton gyromagnetic ratio [rad/s/T], the value used by pulseq-cest."""
CHUNK = 64
"""Cells propagated at a time: the matrices of 64 cells stay in a core's cache."""
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


def recovery_map(tissue: Tissue, duration: Float[Array, ""]) -> LongitudinalMap:
    """Free relaxation and exchange of Mz over `duration` [s]."""
    return _in_chunks(lambda cells, *_: _recovery(cells, duration), tissue)


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
    return _in_chunks(lambda cells, *_: _block(cells, saturation, train), tissue)


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
        blocks = lax.map(lambda one: _block(cells, one, train), saturations)
        return _chain(blocks, _readout(cells, _with_carry_over(readout, carry_over)), initial, order)

    return _in_chunks(chunk, tissue, readout.carry_over, initial)


def _chain(blocks, reading, initial, order):
    def image(mz, number):
        mz = jax.tree.map(lambda leaf: leaf[number], blocks)(mz)
        return reading.leave(mz), reading.signal(mz)

    return lax.scan(image, initial, order)[1]


def _with_carry_over(readout, carry_over):
    return Readout(readout.flip_angle, readout.shot_spacing, carry_over, readout.n_shots, readout.encoded_shot)


def _recovery(tissue, duration) -> LongitudinalMap:
    n = bm.n_transverse(tissue)
    a, b = bm.generator(tissue, 0.0, 0.0)
    free = bm.propagate(a[2 * n :, 2 * n :], b[2 * n :], duration)
    return LongitudinalMap(free.matrix, free.shift)


def _block(tissue, saturation, train) -> LongitudinalMap:
    recovery = _recovery(tissue, saturation.t_rec)
    n = bm.n_transverse(tissue)
    played = _train(tissue, saturation, train)
    matrix, shift = played.matrix[2 * n :, 2 * n :], played.shift[2 * n :]
    return LongitudinalMap(bm.multiply(matrix, recovery.matrix), bm.apply(matrix, recovery.shift) + shift)


def _train(tissue, saturation, train) -> bm.Affine:
    """Pulses with free precession between them, as one map of the full state."""
    n = train.n_pulses
    length = saturation.t_sat * train.duty_cycle / (train.duty_cycle + (n - 1)) if n > 1 else saturation.t_sat
    pulse = _pulse(tissue, saturation, train, length)
    if n == 1:
        return pulse
    pause = (saturation.t_sat - n * length) / (n - 1)
    # the frame follows the RF during pulses and water's nominal frequency between them: the next pulse continues the phase
    free = bm.propagate(*bm.generator(tissue, 0.0, 0.0), pause)
    return bm.then(bm.power(bm.then(pulse, free), n - 1), pulse)


def _pulse(tissue, saturation, train, length) -> bm.Affine:
    w1, offset = GAMMA * saturation.b1 * tissue.b1, 2 * math.pi * saturation.offset_hz
    if train.shape == "gauss":
        return _gauss(tissue, w1, offset, length)
    lock = bm.propagate(*bm.generator(tissue, w1, offset), length)
    if not train.spin_lock:
        return lock
    tip = jnp.arctan2(GAMMA * saturation.b1, jnp.abs(offset)) * jnp.where(offset < 0, -1.0, 1.0) * tissue.b1
    return bm.then(bm.then(_turn(tissue, tip), lock), _turn(tissue, -tip))


def _turn(tissue, angle) -> bm.Affine:
    """Instantaneous rotation of the x-y-z pools about -y: Mz to +x for a positive angle, where the effective field lies."""
    n, shape = bm.n_transverse(tissue), bm.cell_shape(tissue)
    size = 2 * n + 1 + len(tissue.pools)
    cosine, sine = (jnp.broadcast_to(value, shape) for value in (jnp.cos(angle), jnp.sin(angle)))
    matrix = jnp.broadcast_to(jnp.eye(size).reshape((size, size) + (1,) * len(shape)), (size, size, *shape))
    z_rows = [2 * n, *(2 * n + 1 + i for i, pool in enumerate(tissue.pools) if bm.is_transverse(pool))]
    for x, z in enumerate(z_rows):
        matrix = matrix.at[x, x].set(cosine).at[z, z].set(cosine).at[x, z].set(sine).at[z, x].set(-sine)
    return bm.Affine(matrix, jnp.zeros((size, *shape)))


def _gauss(tissue, w1, offset, length) -> bm.Affine:
    """A Gaussian pulse of rms amplitude `w1`, in constant steps."""
    place = (jnp.arange(GAUSS_STEPS) + 0.5) / GAUSS_STEPS - 0.5
    envelope = jnp.exp(-0.5 * (place / GAUSS_SIGMA) ** 2)
    envelope = envelope / jnp.sqrt(jnp.mean(envelope**2))

    def step(total, amplitude):
        return bm.hold(bm.then(total, bm.propagate(*bm.generator(tissue, w1 * amplitude, offset), length / GAUSS_STEPS))), None

    n, shape = bm.n_transverse(tissue), bm.cell_shape(tissue)
    return lax.scan(step, _turn(tissue, jnp.zeros(shape)), envelope)[0]


def _readout(tissue, readout) -> ReadoutMap:
    mz_shape = bm.equilibrium(tissue).shape
    water = jnp.zeros(mz_shape).at[0].set(1.0)
    cosine = jnp.cos(readout.flip_angle * tissue.b1)
    identity = jnp.broadcast_to(jnp.eye(mz_shape[0]).reshape((mz_shape[0],) * 2 + (1,) * (len(mz_shape) - 1)), (mz_shape[0], *mz_shape))
    nothing = bm.Affine(identity, jnp.zeros(mz_shape))
    if readout.n_shots == 1:
        share = cosine if readout.carry_over is None else readout.carry_over
        return ReadoutMap(water, jnp.zeros(mz_shape[1:]), LongitudinalMap(identity * share, nothing.shift))
    flip = bm.Affine(identity.at[0, 0].set(cosine), nothing.shift)
    between = _recovery(tissue, readout.shot_spacing)
    shot = bm.then(flip, bm.Affine(between.matrix, between.shift))
    encode = bm.power(shot, readout.encoded_shot) if readout.encoded_shot else nothing
    leave = bm.then(bm.power(shot, readout.n_shots - 1), flip)
    if readout.carry_over is not None:
        leave = bm.Affine(identity * readout.carry_over, nothing.shift)
    return ReadoutMap(encode.matrix[0], encode.shift[0], LongitudinalMap(leave.matrix, leave.shift))


def _in_chunks(function, tissue: Tissue, scalars=None, vectors=None):
    """`function(cells, scalars, vectors)` over chunks of cells.

    Leaves of `tissue` and `scalars` broadcast with (*cell), those of `vectors` with (pool, *cell).
    """
    shape = jnp.broadcast_shapes(
        bm.cell_shape(tissue), *map(jnp.shape, jax.tree.leaves(scalars)), *(jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(vectors))
    )
    count = math.prod(shape)
    size = min(CHUNK, count)
    n_chunks = -(-count // size)

    def split(leaf, lead=()):
        flat = jnp.broadcast_to(leaf.reshape(lead + (1,) * (len(shape) + len(lead) - leaf.ndim) + leaf.shape[len(lead) :]), lead + shape).reshape((*lead, count))
        padded = jnp.concatenate([flat, jnp.broadcast_to(flat[..., -1:], (*lead, n_chunks * size - count))], axis=-1)
        return jnp.moveaxis(padded.reshape((*lead, n_chunks, size)), -2, 0)

    def join(leaf):
        leaf = jnp.moveaxis(leaf, 0, -2)
        lead = leaf.shape[:-2]
        return leaf.reshape((*lead, n_chunks * size))[..., :count].reshape(lead + shape)

    per_cell = jax.tree.map(split, (tissue, scalars))
    chunks = (*per_cell, jax.tree.map(lambda leaf: split(leaf, leaf.shape[:1]), vectors))
    return jax.tree.map(join, lax.map(lambda chunk: jax.checkpoint(function)(*chunk), chunks))
