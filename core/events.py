"""A sequence played event by event, transverse magnetisation and all: the yardstick, and what Pulseq files are simulated with.

Between its turning points a sequence is constant: RF of one amplitude, frequency and phase, or nothing. Each such step is one affine map
of the full state (see `bloch_mcconnell`), computed once per distinct (duration, amplitude, frequency); its phase is a rotation of the
frame before and after. No approximation besides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scansteer.core import bloch_mcconnell as bm
from scansteer.core.chunks import mapped
from scansteer.core.tissue import Tissue

BATCH = 64


class Steps(NamedTuple):
    """Distinct steps of constant RF."""

    duration: Float[Array, " step"]
    """[s]"""
    amplitude_hz: Float[Array, " step"]
    """Nominal RF amplitude, gamma B1 / 2 pi [Hz]; 0: free precession."""
    frequency_hz: Float[Array, " step"]
    """RF frequency minus nominal water frequency [Hz]; 0 for free precession."""


class Events(eqx.Module):
    """A sequence: which step is played at which phase, and what happens after it."""

    steps: Steps
    step: Int[Array, " event"]
    """Place in `steps`."""
    phase: Float[Array, " event"]
    """RF phase in the frame in which the state is kept [rad]: the frame turns with the RF during RF, with water otherwise. A sequence's own
    phase less 2 pi x the sum of frequency x duration of all RF before."""
    spoil: Bool[Array, " event"]
    """Set transverse magnetisation to zero after the step."""
    acquire: Bool[Array, " event"]
    """Record the state after the step (and after spoiling)."""
    reset: Bool[Array, " event"]
    """Return to the initial state after recording."""
    n_acquired: int = eqx.field(static=True)


def make_events(duration, amplitude_hz, frequency_hz, phase, spoil, acquire, reset) -> Events:
    """Events from one entry per event (NumPy arrays of one length); equal steps are found and shared."""
    table = np.stack([np.asarray(column, float) for column in (duration, amplitude_hz, frequency_hz)])
    order, step = np.unique(table, axis=1, return_inverse=True)
    flags = (jnp.asarray(flag, bool) for flag in (spoil, acquire, reset))
    steps = Steps(*map(jnp.asarray, order))
    return Events(steps, jnp.asarray(step.reshape(-1)), jnp.asarray(phase, float), *flags, n_acquired=int(np.sum(acquire)))


def initial_state(tissue: Tissue, scale=1.0) -> Float[Array, " row"]:
    """`scale` times thermal equilibrium."""
    mz = bm.equilibrium(tissue)
    return scale * jnp.concatenate([jnp.zeros((2 * bm.n_transverse(tissue), *mz.shape[1:])), mz])


def simulate(tissue: Tissue, events: Events, initial: Float[Array, " row"]) -> Float[Array, "acquired row"]:
    """State at each acquisition.

    Parameters
    ----------
    tissue
        One tissue: scalar leaves (use `jax.vmap` for more).
    events
        The sequence.
    initial
        State before the first event and after each reset.

    Returns
    -------
    Rows as in `bloch_mcconnell`: Mx of water and the x-y-z pools, My, Mz of all pools. |Mxy| of water is a length, free of the frame.
    """
    maps = _maps(tissue, events.steps)
    n = bm.n_transverse(tissue)
    kept = jnp.concatenate([jnp.zeros(2 * n), jnp.ones(initial.shape[0] - 2 * n)])

    def play(carry, event):
        state, record, count = carry
        step, cosine, sine, spoil, acquire, reset = event
        state = _rotate(state, n, cosine, -sine)
        state = maps.matrix[step] @ state + maps.shift[step]
        state = _rotate(state, n, cosine, sine)
        state = jnp.where(spoil, kept * state, state)
        record = lax.cond(acquire, lambda record: record.at[count].set(state), lambda record: record, record)
        return (jnp.where(reset, initial, state), record, count + acquire), None

    record = jnp.zeros((events.n_acquired, initial.shape[0]), initial.dtype)
    listed = (events.step, jnp.cos(events.phase), jnp.sin(events.phase), events.spoil, events.acquire, events.reset)
    return lax.scan(play, (initial, record, 0), listed)[0][1]


def _maps(tissue: Tissue, steps: Steps) -> bm.Affine:
    """One map per distinct step, as leading axis."""

    def some(steps: Steps):
        w1 = 2 * math.pi * steps.amplitude_hz * tissue.b1
        return bm.propagate(*bm.generator(tissue, w1, 2 * math.pi * steps.frequency_hz), steps.duration)

    # steps come sorted by duration: a batch needs about the same number of squarings
    maps = mapped(some, steps, BATCH)
    return bm.Affine(jnp.moveaxis(maps.matrix, -1, 0), jnp.moveaxis(maps.shift, -1, 0))


def _rotate(state, n: int, cosine, sine):
    """Turn the transverse components about z."""
    x, y = state[:n], state[n : 2 * n]
    return jnp.concatenate([cosine * x - sine * y, sine * x + cosine * y, state[2 * n :]])
