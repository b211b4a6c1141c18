"""Training runs: simulated and measured scans in, progress and checkpoints on the way, one encoder file out.

A run first simulates scans with their exact posteriors, then takes optimiser steps on random voxels at random numbers of images. Measured
scans, if given, join in by the evidence lower bound alone (*fitting* for the scan itself, *transfer* for later ones). A run may start from
the weights of an encoder of the same scan, and then takes fewer steps. The same seed, machine and number of threads give the same
weights; a run that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from scansteer.core import encoder as encoders
from scansteer.core import signal_basis, training
from scansteer.core.code_generation import with_barriers
from scansteer.core.encoder import Encoder, Gaussian, State
from scansteer.core.errors import InputError, ScansteerError
from scansteer.core.likelihood import Noise
from scansteer.core.signal_basis import Basis
from scansteer.core.training import Samples, Weights
from scansteer.protocols.scan import Scan
from scansteer.realtime import calibration
from scansteer.realtime.encoder_file import Trained, check, load, physics_of, save, shipped, to_bytes
from scansteer.realtime.progress import Tell, shown
from scansteer.realtime.recording import AUXILIARIES, Recording, read
from scansteer.realtime.simulated import (
    DOF_RANGE,
    MISFIT_RANGE,
    SHORT_SIGMA_RANGE,
    SIGMA_RANGE,
    SPREADS,
    Conditions,
    Simulator,
    sampled_columns,
)

CHECKPOINT_SUFFIX = ".checkpoint"
STEPS_PER_CHECKPOINT = 250
WARM_UP_SHARE = 0.03
"""Of the steps, during which the learning rate rises."""
MOST_VOXELS_OF_RECORDING = 1024
"""Voxels drawn from a measured scan."""
SUBSETS_PER_VOXEL = 12
"""Random subsets of a measured scan's images, for each of its voxels."""


@dataclass(frozen=True)
class Settings:
    """What determines a run, besides the scan and the files."""

    seed: int = 0
    n_scans: int = 40
    """Simulated scans; every third plays the published schedule, the others random orders and pulses."""
    n_groups: int = 2
    """Groups of 64 voxels in each."""
    n_short_scans: int = 120
    """Of one group and few images beside them: posteriors of few images are the least Gaussian, and pulses come in any order."""
    n_short: int = 9
    """Images of a short scan."""
    n_steps: int = 3000
    """0: the weights stay as they are, and are calibrated anew."""
    n_refinements: int = 4
    """Stages after the first."""
    n_anchors: int = encoders.N_ANCHORS
    """Anchors per parameter."""
    tolerance: float = signal_basis.TOLERANCE
    """Root mean square of what the basis may leave of a signal [fraction of M0]."""
    batch: int = 768
    learning_rate: float = 3e-3
    towards: float = 0.7
    """Weight of the divergence towards the reference's moments (what is too wide costs) beside that from them."""
    lower_bound: float = 0.05
    """Weight of the evidence lower bound beside the reference's moments."""
    share_measured: float = 0.25
    """Of a batch, where there are measured scans."""
    n_widening_scans: int = 72
    """Simulated scans, not trained on, from which the factors of the widening come."""
    n_calibration_scans: int = 36
    """Yet others, for the calibration figures."""


SIZE = ("n_refinements", "n_anchors", "tolerance")
"""The settings that are an encoder's size: with `--from` those of the weights are usual."""
FURTHER = Settings(n_scans=20, n_short_scans=60, n_steps=600, learning_rate=1e-3, n_widening_scans=18, n_calibration_scans=18)
"""What is usual where a run starts from trained weights."""


class Bank(NamedTuple):
    """Voxels in the middle of scans, as NumPy arrays; many share a gram matrix."""

    gram: Float[np.ndarray, "table pair"]
    """Packed: see `core.encoder.pairs`."""
    place: np.ndarray
    """Of each sample, its gram matrix."""
    projection: Float[np.ndarray, "sample function"]
    energy: Float[np.ndarray, " sample"]
    n_images: Float[np.ndarray, " sample"]
    sigma: Float[np.ndarray, " sample"]
    dof: Float[np.ndarray, " sample"]
    mean: Float[np.ndarray, "sample 2"]
    root: Float[np.ndarray, "sample 3"]
    is_known: Float[np.ndarray, " sample"]

    def pick(self, index: np.ndarray) -> Bank:
        """The samples at the given places, as a bank of their own."""
        return Bank(self.gram[self.place[index]], np.arange(len(index)), *(each[index] for each in self[2:]))

    def samples(self, discrepancy: float) -> Samples:
        """All of it, as training takes it."""
        single = jnp.float32
        return Samples(
            State(*(jnp.asarray(each) for each in (self.gram[self.place].T, self.projection.T, self.energy, self.n_images))),
            Noise(jnp.asarray(self.sigma), jnp.asarray(self.dof), jnp.asarray(discrepancy)),
            Gaussian(jnp.asarray(self.mean, single), jnp.asarray(self.root, single)),
            jnp.asarray(self.is_known, single),
        )


def train(
    scan: Scan,
    mapped: Sequence[str],
    out: Path,
    settings: Settings,
    recordings: Sequence[Recording] = (),
    tell: Tell = lambda *_: None,
    start: Trained | None = None,
) -> Trained:
    """Train an encoder and write it to `out`.

    Parameters
    ----------
    mapped
        Names of the auxiliaries (`t1_s`, ..) that will come as maps.
    recordings
        Measured scans to fit, all with these maps.
    start
        Trained weights of this scan with these maps, to start from; they are brought to the size in `settings`.
    """
    if start is not None:
        check(start, scan, tuple(mapped))
        check_size(settings, start)
    tell("simulating pulses", 0, 1)
    simulator = Simulator(scan, mapped, settings.seed)
    encoder = untrained(simulator, settings) if start is None else resized(simulator, settings, start)
    with ThreadPoolExecutor(2) as pool:
        if settings.n_steps:
            simulated = simulate(simulator, encoder.basis, settings, pool, tell)
            measured = joined([of_recording(simulator, encoder.basis, each, settings.seed) for each in recordings]) if recordings else None
            encoder = optimise(simulator, encoder, simulated, measured, out, settings, tell, digest(start))
        encoder = calibration.widened(simulator, encoder, settings.seed, settings.n_widening_scans, tell)
        figures = calibration.calibrate(simulator, encoder, settings.seed, settings.n_calibration_scans, pool, tell)
    about = {
        "settings": asdict(settings),
        "measured": [each.name for each in recordings],
        "start": None if start is None else digest(start),
    }
    if start is not None and not settings.n_steps:  # the weights are those of that run
        about = {key: start.about.get(key) for key in about}
        about["settings"] = {**(about["settings"] or {}), **{name: getattr(settings, name) for name in SIZE}}
    calibrated = {key: getattr(settings, key) for key in ("seed", "n_widening_scans", "n_calibration_scans")}
    about |= {"versions": versions(), "calibrated": calibrated, "calibration": figures}
    trained = Trained(encoder, scan.name, physics_of(scan), simulator.mapped, about)
    save(out, trained)
    _checkpoint_path(out).unlink(missing_ok=True)
    return trained


def untrained(simulator: Simulator, settings: Settings) -> Encoder:
    """An encoder to train from nothing."""
    basis = signal_basis.make(sampled_columns(simulator, np.random.default_rng([settings.seed, 1])), settings.tolerance)
    return encoders.make(jax.random.PRNGKey(settings.seed), basis, simulator.coordinate, settings.n_refinements, settings.n_anchors)


def resized(simulator: Simulator, settings: Settings, start: Trained) -> Encoder:
    """Trained weights, brought to the size in `settings`; what they keep of their basis is as it was."""
    encoder = training.resized(start.encoder, settings.n_refinements, settings.n_anchors)
    if settings.tolerance <= size_of(start)["tolerance"]:
        return encoder
    columns = sampled_columns(simulator, np.random.default_rng([settings.seed, 1]))
    return eqx.tree_at(lambda e: e.basis, encoder, signal_basis.shortened(encoder.basis, columns, settings.tolerance))


def size_of(trained: Trained) -> dict[str, Any]:
    """The settings in `SIZE` that trained weights have."""
    tolerance = (trained.about.get("settings") or {}).get("tolerance", signal_basis.TOLERANCE)
    return dict(zip(SIZE, (len(trained.encoder.refine), trained.encoder.n_anchors, tolerance), strict=True))


def digest(start: Trained | None) -> str | None:
    """What tells one set of weights from another."""
    return None if start is None else hashlib.sha256(to_bytes(start)).hexdigest()[:16]


def simulate(simulator: Simulator, basis: Basis, settings: Settings, pool: ThreadPoolExecutor, tell: Tell) -> Bank:
    """Simulated scans of all sorts: noise, degrees of freedom, orders, other pulses, errors that the model does not know."""
    banks = []
    n_scans = settings.n_scans + settings.n_short_scans
    for number in range(n_scans):
        tell("simulating scans", number, n_scans)
        is_short = number >= settings.n_scans
        rng = np.random.default_rng([settings.seed, 2, number])
        blocks = simulator.scan.schedule if number % 3 == 0 else simulator.random_order(rng)
        blocks = blocks[: settings.n_short] if is_short else blocks
        misfit = rng.uniform(*MISFIT_RANGE) if number % 2 else 0.0
        spans = SHORT_SIGMA_RANGE if is_short else SIGMA_RANGE, DOF_RANGE
        sigma, dof = (float(np.exp(rng.uniform(*np.log(span)))) for span in spans)
        conditions = Conditions(blocks, sigma, dof, float(misfit), SPREADS[(number // 2) % len(SPREADS)])
        banks.append(of_simulated(simulator, basis, conditions, 1 if is_short else settings.n_groups, rng, pool))
    return joined(banks)


def of_simulated(
    simulator: Simulator, basis: Basis, conditions: Conditions, n_groups: int, rng: np.random.Generator, pool: ThreadPoolExecutor
) -> Bank:
    """Every voxel at every number of images of one simulated scan."""
    expected = simulator.expected(conditions.blocks)
    drawn = simulator.draw(rng, conditions, n_groups, expected)
    known = simulator.references(drawn, conditions, expected, pool)
    coefficients = simulator.coefficients(basis, expected, drawn.maps)
    n_images, n_shared, size = coefficients.shape
    n_voxels = drawn.signals.shape[1]
    group = np.arange(n_voxels) * n_shared // n_voxels
    first, second = encoders.pairs(basis.ranks)
    gram = np.cumsum(coefficients[..., first] * coefficients[..., second], axis=0)
    projection = np.cumsum(coefficients[:, group] * drawn.signals[..., None], axis=0)
    count = np.broadcast_to(np.arange(1.0, n_images + 1)[:, None], drawn.signals.shape)
    return Bank(
        gram.reshape(-1, len(first)),
        (np.arange(n_images)[:, None] * n_shared + group).reshape(-1),
        projection.reshape(-1, size),
        np.cumsum(drawn.signals**2, axis=0).reshape(-1),
        count.reshape(-1),
        np.full(count.size, conditions.sigma),
        np.full(count.size, conditions.dof),
        np.asarray(known.mean).reshape(-1, 2),
        np.asarray(known.root).reshape(-1, 3),
        np.ones(count.size),
    )


def of_recording(simulator: Simulator, basis: Basis, recording: Recording, seed: int) -> Bank:
    """Random subsets of a measured scan's images; prefixes among them."""
    rng = np.random.default_rng([seed, 3])
    voxels = np.sort(rng.permutation(recording.signals.shape[1])[:MOST_VOXELS_OF_RECORDING])
    signals = recording.signals[:, voxels]
    maps = {name: recording.maps[name][voxels] for name in simulator.mapped}
    played = simulator.expected(recording.blocks)[list(recording.repetitions)]
    coefficients = simulator.coefficients(basis, played, maps)
    n_images, n_voxels = signals.shape
    first, second = encoders.pairs(basis.ranks)
    banks = []
    for number in range(SUBSETS_PER_VOXEL):
        count = int(rng.integers(3, n_images + 1))
        chosen = np.arange(count) if number % 2 == 0 else np.sort(rng.permutation(n_images)[:count])
        noise = recording.noise[count - 1]
        part, seen = coefficients[chosen], signals[chosen]
        gram = np.einsum("igp,igp->gp", part[..., first], part[..., second])
        projection = np.einsum("ivm,iv->vm", np.broadcast_to(part, (count, n_voxels, part.shape[-1])), seen)
        place = np.arange(n_voxels) if len(gram) > 1 else np.zeros(n_voxels, int)
        each = [np.full(n_voxels, float(value)) for value in (count, noise.sigma, noise.dof)]
        nothing = np.zeros((n_voxels, 2)), np.tile([1.0, 0.0, 1.0], (n_voxels, 1)), np.zeros(n_voxels)
        banks.append(Bank(gram, place, projection, np.sum(seen**2, axis=0), *each, *nothing))  # pyright: ignore[reportCallIssue] - three and three
    return joined(banks)


def joined(banks: Sequence[Bank]) -> Bank:
    """Banks of one basis as one."""
    offsets = np.cumsum([0, *(len(bank.gram) for bank in banks[:-1])])
    moved = [bank._replace(place=bank.place + offset) for bank, offset in zip(banks, offsets, strict=True)]
    return Bank(*(np.concatenate(parts) for parts in zip(*moved, strict=True)))


def optimise(
    simulator: Simulator,
    encoder: Encoder,
    simulated: Bank,
    measured: Bank | None,
    out: Path,
    settings: Settings,
    tell: Tell,
    start: str | None = None,
) -> Encoder:
    """All steps, from the checkpoint beside `out` if there is one of the same run; `start` says whose weights `encoder` has."""
    plan = encoders.plan(encoder)
    rise = int(WARM_UP_SHARE * settings.n_steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, rise, settings.n_steps, 0.01 * settings.learning_rate
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = optimiser.init(eqx.filter(encoder, training.trainable(encoder)))
    weights = Weights(1.0, settings.towards, settings.lower_bound)
    step = eqx.filter_jit(
        lambda encoder, state, key, samples: training.step(encoder, state, optimiser, plan, key, samples, weights),
        compiler_options=with_barriers(),  # pyright: ignore[reportCallIssue] - for jax.jit
    )
    about = json.dumps(
        {
            "settings": asdict(settings),
            "scan": physics_of(simulator.scan),
            "measured": 0 if measured is None else len(measured.place),
            "start": start,
        }
    )
    done, encoder, state = _resumed(out, about, (encoder, state))
    discrepancy = simulator.scan.noise.discrepancy
    for number in range(done, settings.n_steps):
        rng = np.random.default_rng([settings.seed, 4, number])
        samples = _batch(rng, simulated, measured, settings, discrepancy)
        encoder, state, losses = step(encoder, state, jax.random.fold_in(jax.random.PRNGKey(settings.seed), number), samples)
        if number % 50 == 49:
            tell(f"training, divergence {float(losses.moments):.3f}", number + 1, settings.n_steps)
        if (number + 1) % STEPS_PER_CHECKPOINT == 0:
            _checkpoint(out, about, number + 1, (encoder, state))
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(eqx.filter(encoder, eqx.is_inexact_array))):
        raise ScansteerError("Training diverged: weights are not finite; train with another --seed.")
    return encoder


def versions() -> dict[str, str]:
    """Versions that the weights depend on."""
    from importlib import metadata

    return {name: metadata.version(name) for name in ("scansteer", "jax", "jaxlib", "equinox", "optax", "numpy")}


def _batch(rng: np.random.Generator, simulated: Bank, measured: Bank | None, settings: Settings, discrepancy: float) -> Samples:
    n_measured = 0 if measured is None else int(settings.share_measured * settings.batch)
    parts = [simulated.pick(rng.integers(len(simulated.place), size=settings.batch - n_measured))]
    if measured is not None:
        parts.append(measured.pick(rng.integers(len(measured.place), size=n_measured)))
    return joined(parts).samples(discrepancy)


def _checkpoint_path(out: Path) -> Path:
    return out.with_name(out.name + CHECKPOINT_SUFFIX)


def _checkpoint(out: Path, about: str, done: int, tree: Any) -> None:
    """One line that says what it is, then the leaves; replaced whole or not at all."""
    packed = io.BytesIO()
    packed.write(json.dumps({"done": done, "run": about}).encode() + b"\n")
    eqx.tree_serialise_leaves(packed, tree)
    path = _checkpoint_path(out)
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(packed.getvalue())
        partial.replace(path)
    except OSError as error:
        raise ScansteerError(f"Cannot write checkpoint {path}: {error.strerror}.") from error


def _resumed(out: Path, about: str, tree: tuple[Encoder, Any]) -> tuple[int, Encoder, Any]:
    """Steps done, encoder and optimiser of a checkpoint of this very run; without one, the start."""
    path = _checkpoint_path(out)
    if path.is_file():
        packed = io.BytesIO(path.read_bytes())
        try:
            header = json.loads(packed.readline())
            if header["run"] == about:
                return int(header["done"]), *eqx.tree_deserialise_leaves(packed, tree)
        except (ValueError, KeyError, EOFError, RuntimeError):
            pass  # a torn checkpoint, or one of another version: start again
    return 0, *tree


def train_files(
    scan: Scan,
    files: Sequence[Path],
    out: Path,
    roles: Sequence[str] | None = None,
    roi: Path | None = None,
    maps: dict[str, str] | None = None,
    seed: int = 0,
    steps: int | None = None,
    start: str | None = None,
    refinements: int | None = None,
    anchors: int | None = None,
    tolerance: float | None = None,
) -> None:
    """The command: read the files, train with progress on the terminal, say what came out.

    Parameters
    ----------
    roles
        Maps (`t1`, ..) that will come with the scan; none: those of the weights to start from, or those that come with the files.
    steps
        Of the optimiser; none: as many as usual.
    start
        File of weights to start from, or `shipped`.
    refinements, anchors, tolerance
        The encoder's size, see `Settings`; none: as usual, or as those weights have.

    Raises
    ------
    InputError
        Unknown roles, or files that do not have these maps.
    """
    trained = weights_of(start, scan)
    if steps == 0 and trained is None:
        raise InputError("--steps 0 calibrates weights that are trained; name them with --from.")
    if steps == 0 and files:
        raise InputError(f"--steps 0 calibrates on simulated scans and learns nothing from {files[0]}; leave the files out, or give steps.")
    usual = FURTHER if trained is not None and steps != 0 else Settings()
    if trained is not None:
        usual = replace(usual, **size_of(trained))
    chosen = {"n_steps": steps, "n_refinements": refinements, "n_anchors": anchors, "tolerance": tolerance}
    settings = replace(usual, seed=seed, **{name: value for name, value in chosen.items() if value is not None})
    if trained is not None:
        check_size(settings, trained)
    with shown() as tell:
        recordings = []
        for number, file in enumerate(files):
            tell(f"reading {file.name}", number, len(files))
            recording, warnings = read(file, scan, roi, maps)
            recordings.append(recording)
            for warning in warnings:
                tell(f"warning: {warning}", number, len(files))
        mapped = mapped_names(roles, recordings, trained)
        trained = train(scan, mapped, out, settings, recordings, tell, trained)
    last = trained.about["calibration"][-1]
    print(f"Wrote {out}; of {last['draws']} simulated truths {last['coverage']['0.95']:.1%} lie in the 95 % region at n = {last['n']}.")


def check_size(settings: Settings, start: Trained) -> None:
    """Can trained weights be brought to the size in `settings`?

    Raises
    ------
    InputError
        They can not, or not without training.
    """
    refinements, anchors, tolerance = size_of(start).values()
    if settings.tolerance < tolerance:
        raise InputError(
            f"--tolerance {settings.tolerance:g}: the basis of --from was made to {tolerance:g} and can only be shortened; train from nothing."
        )
    otherwise = "and must be trained for others; give --steps."
    if not settings.n_steps and settings.n_refinements > refinements:
        raise InputError(f"--refinements {settings.n_refinements}: the weights of --from have {refinements}, {otherwise}")
    if not settings.n_steps and settings.n_anchors != anchors:
        raise InputError(f"--anchors {settings.n_anchors}: the weights of --from have {anchors}, {otherwise}")


def weights_of(start: str | None, scan: Scan) -> Trained | None:
    """The weights that a run starts from: those in a file, or those that come with the scan."""
    if start is None:
        return None
    found = shipped(scan) if start == "shipped" else load(Path(start))
    if found is None:
        raise InputError(f"No encoder is shipped for scan {scan.name!r}; leave --from away, or name a file.")
    return found


def mapped_names(roles: Sequence[str] | None, recordings: Sequence[Recording], start: Trained | None = None) -> tuple[str, ...]:
    """The scan's names of the auxiliaries that come as maps."""
    if roles is not None:
        unknown = [role for role in roles if role not in AUXILIARIES]
        if unknown:
            raise InputError(f"--mapped names {unknown[0]!r}; known maps are {', '.join(AUXILIARIES)}.")
        names = {AUXILIARIES[role] for role in roles}
    elif start is not None:
        names = set(start.mapped)
    else:
        names = set(recordings[0].maps) if recordings else set()
    for recording in recordings:
        missing = names - set(recording.maps)
        if missing:
            raise InputError(f"{recording.name} has no map of {sorted(missing)[0]}; give it with --map, or choose other maps with --mapped.")
    return tuple(sorted(names))
