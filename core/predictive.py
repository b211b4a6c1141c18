"""What each candidate pulse would read next, at a few nuisance nodes and coarse points over the box of (f, k).

A pulse acts on the magnetisation that the latest readout left by an affine map, computed once per candidate before the scan; only
the magnetisation changes from image to image. Nuisances are a star: all at their centre, and each in turn at nodes beside it
with the others at their centre, so that their number adds and does not multiply. Over the points a polynomial meets the signals of
the built-in scans to 1e-4 of M0 (3e-4 for semisolids; rms). Coarser than the likelihood's nodes, and enough to choose by.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scansteer.core import dictionary, nuisance
from scansteer.core import signal as spin
from scansteer.core.dictionary import Forward, Magnetisation
from scansteer.core.nuisance import Axis, Measured

N_POINTS = 10
"""Coarse points per parameter (core.lattice)."""


class Star(NamedTuple):
    """The nuisance nodes: node 0 is the centre, then the other nodes of each axis from lower to upper.

    For each of `nuisance.products`, of an axis of the chain and one of the tissue, two more: both at their lowest node, and both at their highest.
    """

    axes: tuple[Axis, ...]
    """Chain axes first, as everywhere."""
    chain: Float[np.ndarray, "chain axis"]
    """Values of the chain's axes at the distinct nodes of the chain."""
    tissue: Float[np.ndarray, "tissue axis"]
    place: tuple[Int[np.ndarray, " node"], Int[np.ndarray, " node"]]
    """Of every node among those of the chain, and among those of the tissue."""

    @property
    def n_nodes(self) -> int:
        return len(self.place[0])


class Responses(eqx.Module):
    """What every candidate reads, per unit amplitude: weight . (Mz left by the latest readout) + offset; float32."""

    weight: Float[Array, "pool node candidate point"]
    offset: Float[Array, "node candidate point"]


class Coarse(eqx.Module):
    """What predictions are made from, whatever is played."""

    forward: Forward
    """Its nuisance nodes are the distinct ones of the star's chain and tissue."""
    read: spin.ReadoutMap
    place: tuple[Int[Array, " node"], Int[Array, " node"]]
    """As in `Star`."""


def star(chain_axes: Sequence[Axis], tissue_axes: Sequence[Axis], at_most: int = 3) -> Star:
    """An odd number of nodes per axis, as many as it asks for but not more than `at_most`."""

    def odd(axes: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(axis._replace(n_nodes=min(at_most, axis.n_nodes + 1 - axis.n_nodes % 2)) for axis in axes)

    chain, tissue = odd(chain_axes), odd(tissue_axes)
    chain_values, tissue_values = _star_values(chain), _star_values(tissue)
    n_chain, n_tissue = len(chain_values), len(tissue_values)
    of_chain = np.concatenate([np.arange(n_chain), np.zeros(n_tissue - 1, int)])
    of_tissue = np.concatenate([np.zeros(n_chain, int), np.arange(1, n_tissue)])
    axes = (*chain, *tissue)
    pairs = nuisance.products(axes, ())
    of_chain = np.append(of_chain, [_ends(chain, i) for i, _ in pairs]).astype(int)
    of_tissue = np.append(of_tissue, [_ends(tissue, j - len(chain)) for _, j in pairs]).astype(int)
    return Star(axes, chain_values, tissue_values, (of_chain, of_tissue))


def columns(star: Star, maps: Mapping[str, Measured]) -> Float[np.ndarray, "mixture column node"]:
    """The linear maps from signals at the star's nodes to the likelihood's columns, in the order of `nuisance.columns`."""
    rows = [nuisance.columns((axis,), {name: known for name, known in maps.items() if name == axis.name}) for axis in star.axes]
    choices = product(*(range(len(each)) for each in rows))
    pairs = nuisance.products(star.axes, maps)
    return np.stack([_star_columns(star, [rows[j][number] for j, number in enumerate(choice)], pairs) for choice in choices])


def response(read: spin.ReadoutMap, block: spin.LongitudinalMap, tissue: Int[Array, " node"]) -> Responses:
    """Of one candidate, from its map of the magnetisation, at the tissue nodes of the star; its axis has length 1."""
    weight = jnp.einsum("ptg,pqtg->qtg", read.weight, block.matrix)
    offset = jnp.sum(read.weight * block.shift, axis=0) + read.offset
    return Responses(weight[:, tissue, None].astype(jnp.float32), offset[tissue, None].astype(jnp.float32))


def together(each: Sequence[Responses]) -> Responses:
    """Candidates side by side."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves, axis=-2)), *each)  # XLA would compile this for a second


def some(responses: Responses, which: Int[np.ndarray, " chosen"]) -> Responses:
    """Of the candidates only those."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[..., which, :]), responses)


def predict(coarse: Coarse, responses: Responses, state: Magnetisation) -> Float[Array, "node candidate point"]:
    """Signals per unit amplitude of every candidate as the next image, at the star's nodes; float32."""
    chain, tissue = coarse.place
    mz = state.mz[:, chain, tissue, None].astype(jnp.float32)
    return sum((responses.weight[q] * mz[q] for q in range(len(mz))), responses.offset)


def predict_ahead(coarse: Coarse, state: Magnetisation, blocks: spin.LongitudinalMap) -> Float[Array, "node image point"]:
    """Signals per unit amplitude of several blocks played one after the other; leaves of `blocks` lead with the image axis."""
    chain, tissue = coarse.place

    def one(state: Magnetisation, block: spin.LongitudinalMap):
        state, signals = dictionary.play(coarse.forward, coarse.read, state, block)
        return state, signals[chain * state.mz.shape[2] + tissue].astype(jnp.float32)

    return jnp.swapaxes(jax.lax.scan(one, state, blocks)[1], 0, 1)


def curvature(star: Star, signals: Float[np.ndarray, "node image point"]) -> Float[np.ndarray, "axis image"]:
    """What a first-order description leaves out along each nuisance, over its range and over the points of (f, k); rms, fraction of M0.

    With x = -1 .. 1 over the range and nodes at +-x_1, the signal is about F + F' x + c x^2, and the rms of x^2 is 1 / sqrt(5).
    """
    left_out, first = [], 1
    for axis in star.axes:
        nodes = axis.coordinate(axis.node_values())
        lower, upper = signals[first], signals[first + axis.n_nodes - 2]
        second = (0.5 * (lower + upper) - signals[0]) / nodes[-1] ** 2
        left_out.append(np.sqrt(np.mean(second**2, axis=-1) / 5))
        first += axis.n_nodes - 1
    return np.stack(left_out) if left_out else np.zeros((0, signals.shape[1]))


def at_draws(
    signals: Float[Array, "node image point"], rows: tuple[Float[Array, "voxel draw point_f"], Float[Array, "voxel draw point_k"]]
) -> Float[Array, "voxel draw node image"]:
    """Signals at a few draws of (f, k) per voxel; `rows` lead from the coarse points along f, and along k, to the draws."""
    rows = (rows[0].astype(signals.dtype), rows[1].astype(signals.dtype))
    interpolation = (rows[0][..., :, None] * rows[1][..., None, :]).reshape(-1, signals.shape[-1])
    flat = signals.reshape(-1, signals.shape[-1])
    return (interpolation @ flat.T).reshape(*rows[0].shape[:2], *signals.shape[:2])


def _ends(axes: Sequence[Axis], number: int) -> tuple[int, int]:
    """The lowest and the highest node of an axis among the star's."""
    first = 1 + sum(axis.n_nodes - 1 for axis in axes[:number])
    return first, first + axes[number].n_nodes - 2


def _star_values(axes: Sequence[Axis]) -> np.ndarray:
    """Values of all axes: at the centre, then axis by axis at the nodes beside it."""
    values = [axis.node_values() for axis in axes]
    centre = np.array([each[len(each) // 2] for each in values])
    rows = [centre]
    for j, each in enumerate(values):
        for value in np.delete(each, len(each) // 2):
            rows.append(np.where(np.arange(len(axes)) == j, value, centre))
    return np.stack(rows)


def _star_columns(star: Star, rows: Sequence[np.ndarray], pairs: Collection[tuple[int, int]]) -> np.ndarray:
    """From each axis's rows (value, slope, ..) over its own nodes: values add up about the centre, slopes stand as they are; then the products."""
    spread = [_over_star(star, number, own) for number, own in enumerate(rows)]
    mean = sum((own[0] for own in spread), np.zeros(star.n_nodes))
    mean[0] += 1.0 - len(spread)
    both = []
    for number, (i, j) in enumerate(nuisance.products(star.axes, ())):
        if (i, j) not in pairs:
            continue
        mixed = _mixed_derivative(star, i, j, number)
        mine, others = (rows[axis] @ _node_coordinates(star.axes[axis]) for axis in (i, j))
        mean += mixed * mine[0] * others[0]
        spread[i][1:] += mine[1:, None] * mixed * others[0]
        spread[j][1:] += others[1:, None] * mixed * mine[0]
        both.append(mixed * mine[1] * others[1])
    return np.stack([mean, *(row for own in spread for row in own[1:]), *both])


def _over_star(star: Star, number: int, rows: np.ndarray) -> np.ndarray:
    """Rows over one axis's own nodes, over those of the star."""
    first, last = _ends(star.axes, number)
    n = rows.shape[1]
    spread = np.zeros((len(rows), star.n_nodes))
    spread[:, 0] = rows[:, n // 2]
    spread[:, first : last + 1] = np.delete(rows, n // 2, axis=1)
    return spread


def _mixed_derivative(star: Star, i: int, j: int, number: int) -> np.ndarray:
    """Weights of the nodes for the derivative by the coordinates of two axes whose product is the `number`-th that counts."""
    own = star.n_nodes - 2 * (len(nuisance.products(star.axes, ())) - number)
    weights = np.zeros(star.n_nodes)
    weights[0] = 2.0
    weights[[*_ends(star.axes, i), *_ends(star.axes, j)]] = -1.0
    weights[[own, own + 1]] = 1.0
    return weights / (2 * _node_coordinates(star.axes[i])[-1] * _node_coordinates(star.axes[j])[-1])


def _node_coordinates(axis: Axis) -> np.ndarray:
    return axis.coordinate(axis.node_values())
