"""Truths for closed-loop studies: scenes whose every voxel is known, and worlds in which the scan's description is wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import signal
from scansteer.protocols import tissue_model
from scansteer.protocols.scan import Auxiliary, Parameter, Pool, Range, SaturationBlock, Scan, bounds

NOISE = 0.005
"""Standard deviation of one pixel's noise over the brightest M0."""
BRIGHTEST = 5000.0
"""M0 of the most sensitive voxel [pixel units]."""
MOVES_AT = 6
"""Image from which a voxel that moves holds half of another tissue."""

BRAIN = {
    "white": {"f": 0.45, "k": 0.43, "t1_s": 0.25, "t2_s": 0.15},
    "grey": {"f": 0.25, "k": 0.55, "t1_s": 0.45, "t2_s": 0.25},
    "csf": {"f": 0.05, "k": 0.50, "t1_s": 0.95, "t2_s": 0.90},
    "lesion": {"f": 0.18, "k": 0.35, "t1_s": 0.60, "t2_s": 0.45},
}
"""Where each tissue lies within the scan's ranges (0: lower, 1: upper); a voxel scatters about it by a tenth of the range."""


@dataclass(frozen=True)
class Scene:
    """What lies in the scanner: some voxels that are scanned together."""

    described: Scan
    """As it is described to whoever looks at the images."""
    true: Scan
    """As it is: may hold other pools."""
    values: Mapping[str, np.ndarray]
    """Parameters and auxiliaries by the scan's names and in its units: (voxel,)."""
    maps: Mapping[str, np.ndarray]
    """Auxiliaries as measured before the scan: (voxel,)."""
    amplitude: np.ndarray
    """M0 x coil [pixel units]: (voxel,)."""
    carry_over: float | None
    first_mz: float
    offset: float
    sigma: float = NOISE * BRIGHTEST
    rician: bool = False
    drift: float = 0.0
    """Gain that is lost per image."""
    other: Scene | None = None
    """From image `MOVES_AT` on half of every voxel is what lies here; none: nothing moves."""
    seed: tuple[int, ...] = field(default=(0,))

    @property
    def truth(self) -> np.ndarray:
        """True (f, k) of every voxel: (voxel, 2)."""
        return np.stack([self.values[name] for name in self.described.parameter_names], axis=1)

    @property
    def n_voxels(self) -> int:
        return len(self.amplitude)


class Scanner:
    """Plays any pulse on a scene; scenes of equal size and pools share the compilation."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._tissue = tissue_model.tissue(scene.true, {name: jnp.asarray(value) for name, value in scene.values.items()}, voxels=True)
        self._reading = _READING(self._tissue, tissue_model.readout(scene.true, scene.carry_over))
        self._train = tissue_model.train(scene.true)
        self._mz = signal.equilibrium(self._tissue) * scene.first_mz
        self._n_played = 0
        self._other = None if scene.other is None else Scanner(scene.other)
        for index in range(scene.true.first_state.n_dummies):
            self._read(scene.true.schedule[0], first=index == 0)

    def play(self, block: SaturationBlock) -> np.ndarray:
        """Play one repetition: pixel values, (voxel,)."""
        scene, rng = self.scene, np.random.default_rng((*self.scene.seed, 77, self._n_played))
        is_first = self._n_played == 0 and not scene.true.first_state.n_dummies
        clean = self._read(block, first=is_first) + scene.offset
        if self._other is not None:
            elsewhere = self._other._read(block, first=is_first) + scene.offset
            clean = 0.5 * (clean + elsewhere) if self._n_played >= MOVES_AT else clean
        clean = clean + scene.described.noise.discrepancy * rng.normal()
        real = scene.amplitude * (1 - scene.drift) ** self._n_played * clean + rng.normal(0.0, scene.sigma, scene.n_voxels)
        imaginary = rng.normal(0.0, scene.sigma, scene.n_voxels)
        self._n_played += 1
        return np.hypot(real, imaginary) if scene.rician else real

    def _read(self, block: SaturationBlock, *, first: bool) -> np.ndarray:
        played = block.model_copy(update={"t_rec_s": 0.0}) if first else block
        self._mz = _MAP(self._tissue, tissue_model.saturation(self.scene.true, played), self._train)(self._mz)
        read = np.asarray(self._reading.signal(self._mz))
        self._mz = self._reading.leave(self._mz)
        return read


_MAP = jax.jit(signal.saturation_map, static_argnums=2)
_READING = jax.jit(signal.readout_map)


def mapped_auxiliaries(scan: Scan) -> tuple[str, ...]:
    """Studies give scans of semisolids, that is of brains, maps of T1 and T2, and others none."""
    is_brain = any(pool.kind == "semisolid" and pool.f in scan.parameters for pool in scan.pools)
    return tuple(name for name in ("t1_s", "t2_s") if is_brain and scan.auxiliaries[name].upper > scan.auxiliaries[name].lower)  # type: ignore[index]


def from_priors(scan: Scan, n_voxels: int, seed: tuple[int, ...]) -> Scene:
    """Everything drawn from the scan's priors: parameters, auxiliaries and what was measured of them, amplitude, first state."""
    rng = np.random.default_rng(seed)
    values = {name: _draw(parameter, n_voxels, rng) for name, parameter in scan.parameters.items()}
    values |= {name: rng.uniform(span.lower, span.upper, n_voxels) for name, span in scan.auxiliaries.items()}
    return _scene(scan, values, seed, rng)


def single(scan: Scan, seed: tuple[int, ...]) -> Scene:
    """One voxel drawn from the priors."""
    return from_priors(scan, 1, seed)


def digital(scan: Scan, n_voxels: int, seed: tuple[int, ...]) -> Scene:
    """What a scan is about: a digital brain where it is one of brains, else a phantom of one solution."""
    return (brain if mapped_auxiliaries(scan) else solution)(scan, n_voxels, seed)


def brain(scan: Scan, n_voxels: int, seed: tuple[int, ...]) -> Scene:
    """White and grey matter, CSF and lesion by turns."""
    fraction, rate = scan.parameter_names
    tissues = [list(BRAIN.values())[number % len(BRAIN)] for number in range(n_voxels)]
    names = {fraction: "f", rate: "k", **{name: name for name in ("t1_s", "t2_s")}}
    shares = {name: np.array([tissue[key] for tissue in tissues]) for name, key in names.items()}
    return _about(scan, shares, 0.05, n_voxels, seed, np.random.default_rng(seed))


def solution(scan: Scan, n_voxels: int, seed: tuple[int, ...]) -> Scene:
    """Vials of about one solution: its (f, k) is drawn from the priors, and they lie within a tenth of the box's sides of it.

    (The published vials lie within 0.02 and 0.07 of their mean.)
    """
    rng = np.random.default_rng(seed)
    shares = {name: np.full(n_voxels, _drawn_share(each, 1, rng)[0]) for name, each in scan.parameters.items()}
    return _about(scan, shares, 0.1, n_voxels, seed, rng)


def assortment(scan: Scan, n_voxels: int, seed: tuple[int, ...]) -> Scene:
    """Vials spread over the box: no pulse is right for all of them."""
    shares = {name: np.full(n_voxels, 0.5) for name in scan.parameters}
    return _about(scan, shares, 0.4, n_voxels, seed, np.random.default_rng(seed))


def _about(
    scan: Scan, shares: Mapping[str, np.ndarray], scatter: float, n_voxels: int, seed: tuple[int, ...], rng: np.random.Generator
) -> Scene:
    """Voxels whose quantities scatter about given places in their ranges (0: lower, 1: upper); the others lie anywhere in theirs."""
    spans = {**scan.parameters, **scan.auxiliaries}
    middle = np.full(n_voxels, 0.5)
    placed = {
        name: np.clip(shares.get(name, middle) + (scatter if name in shares else 0.5) * rng.uniform(-1, 1, n_voxels), 0.01, 0.99) for name in spans
    }
    return _scene(scan, {name: _at(span, placed[name]) for name, span in spans.items()}, seed, rng)


def of_tissue(scan: Scan, tissue: str, seed: tuple[int, ...]) -> Scene:
    """One voxel with the parameters, and where it is mapped the relaxation times, of a tissue of `BRAIN`; all else drawn from the scan's ranges."""
    rng = np.random.default_rng(seed)
    fraction, rate = scan.parameter_names
    known = {fraction: "f", rate: "k", **{name: name for name in mapped_auxiliaries(scan)}}
    spans = {**scan.parameters, **scan.auxiliaries}
    shares = {name: BRAIN[tissue][known[name]] if name in known else rng.uniform() for name in spans}
    return _scene(scan, {name: np.array([span.lower + shares[name] * (span.upper - span.lower)]) for name, span in spans.items()}, seed, rng)


def _scene(scan: Scan, values: dict[str, np.ndarray], seed: tuple[int, ...], rng: np.random.Generator) -> Scene:
    n_voxels = len(next(iter(values.values())))
    for pool in scan.pools:
        if isinstance(pool.t2_s, Range):
            values[tissue_model.pool_t2_name(pool)] = rng.uniform(pool.t2_s.lower, pool.t2_s.upper, n_voxels)
    carry = scan.readout.carry_over
    return Scene(
        described=scan,
        true=scan,
        values=values,
        maps={name: _measured(scan, name, values[name], rng) for name in mapped_auxiliaries(scan)},
        amplitude=BRIGHTEST * np.exp(rng.uniform(np.log(0.5), 0.0, n_voxels)),
        carry_over=None if carry is None else float(rng.uniform(*bounds(carry))),
        first_mz=float(rng.uniform(*bounds(scan.first_state.mz))),
        offset=float(rng.uniform(*bounds(scan.readout.offset))),
        seed=seed,
    )


def _draw(parameter: Parameter, n: int, rng: np.random.Generator) -> np.ndarray:
    return _at(parameter, _drawn_share(parameter, n, rng))


def _drawn_share(parameter: Parameter, n: int, rng: np.random.Generator) -> np.ndarray:
    """Places in its range, 0 .. 1, as its prior has them."""
    return rng.beta(2, 2, n) if parameter.prior == "beta" else rng.uniform(size=n)


def _at(span: Parameter | Auxiliary, share: np.ndarray) -> np.ndarray:
    """The value at a place in a range; even in the logarithm where the prior is."""
    if isinstance(span, Parameter) and span.prior == "log-uniform":
        return span.lower * (span.upper / span.lower) ** share
    return span.lower + share * (span.upper - span.lower)


def _measured(scan: Scan, name: str, true: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    span = scan.auxiliaries[name]  # type: ignore[index]
    error = np.hypot(span.map_error, span.map_error_relative * true)
    return np.clip(true + error * rng.normal(size=len(true)), span.lower, span.upper)


World = Callable[[Scene], Scene]
"""What is wrong: from a scene that is as described to one that is not."""


def _either_way(scene: Scene) -> np.ndarray:
    """+1 or -1 per voxel."""
    return np.random.default_rng((*scene.seed, 1)).choice([-1.0, 1.0], scene.n_voxels)


def _with(scene: Scene, **values: np.ndarray) -> Scene:
    return replace(scene, values={**scene.values, **values})


def extra_pool(scene: Scene) -> Scene:
    """A pool that the description lacks: a fifth of the solute's box at two thirds of its shift, or an amide beside a semisolid."""
    scan = scene.true
    main = next(pool for pool in scan.pools if pool.f in scan.parameters)
    if main.kind == "semisolid":
        added = Pool(name="unknown", kind="solute", offset_ppm=3.5, f=0.003, k_per_s=100.0, t2_s=0.01)
    else:
        fraction, rate = scan.parameters.values()
        added = Pool(name="unknown", kind="solute", offset_ppm=main.offset_ppm / 1.5, f=0.2 * fraction.upper, k_per_s=rate.centre, t2_s=0.02)
    return replace(scene, true=scan.model_copy(update={"pools": (*scan.pools, added)}))


def super_lorentzian(scene: Scene) -> Scene:
    """The semisolid is a super-Lorentzian of 10 us; where there is none, a weak one lies in the background."""
    changed = {"lineshape": "super-lorentzian", "t2_s": 10e-6}
    pools = tuple(pool.model_copy(update=changed) if pool.kind == "semisolid" else pool for pool in scene.true.pools)
    if not any(pool.kind == "semisolid" for pool in pools):
        pools = (*pools, Pool(name="background", kind="semisolid", offset_ppm=0.0, f=0.01, k_per_s=20.0, **changed))
    return replace(scene, true=scene.true.model_copy(update={"pools": pools}))


def b1_off(scene: Scene) -> Scene:
    """B1 10 % beside its nominal value, whatever the description allows for."""
    return _with(scene, b1_relative=1 + 0.1 * _either_way(scene))


def b0_off(scene: Scene) -> Scene:
    """B0 0.3 ppm beside its nominal value, whatever the description allows for."""
    return _with(scene, b0_ppm=0.3 * _either_way(scene))


def maps_off(scene: Scene) -> Scene:
    """T1 and T2 10 % beside their maps, or, without maps, 10 % beyond an end of their ranges."""
    way, wrong = _either_way(scene), {}
    for name in ("t1_s", "t2_s"):
        span = scene.described.auxiliaries[name]
        near = scene.values[name] if name in scene.maps else np.where(way > 0, span.upper, span.lower)
        wrong[name] = near * (1 + 0.1 * way)
    return _with(scene, **wrong)


def wrong_first_state(scene: Scene) -> Scene:
    """Mz before the first image 0.3 below what the description allows."""
    return replace(scene, first_mz=max(0.0, bounds(scene.described.first_state.mz)[0] - 0.3))


def moved(scene: Scene) -> Scene:
    """From one image on half of the voxel is another tissue."""
    neighbour = from_priors(scene.described, scene.n_voxels, (*scene.seed, 9))
    return replace(scene, other=replace(scene, values=neighbour.values))


WORLDS: dict[str, World] = {
    "as described": lambda scene: scene,
    "extra pool": extra_pool,
    "super-lorentzian": super_lorentzian,
    "b1 10 % off": b1_off,
    "b0 0.3 ppm off": b0_off,
    "maps 10 % off": maps_off,
    "rician noise": lambda scene: replace(scene, rician=True),
    "voxel moves": moved,
    "drift 1 % per image": lambda scene: replace(scene, drift=0.01),
    "wrong first state": wrong_first_state,
}
