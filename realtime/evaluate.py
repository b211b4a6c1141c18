"""Encoder against reference on a stored scan, image by image, and against the truth on simulated ones."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import agreement, nuisance, voxel_columns
from scansteer.core.encoder import Gaussian
from scansteer.core.errors import InputError, ScansteerError
from scansteer.core.grid_posterior import Info
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols.scan import Scan, bounds
from scansteer.realtime import calibration, encoder_file
from scansteer.realtime.encoded import map_error
from scansteer.realtime.encoder_file import Trained
from scansteer.realtime.progress import Tell, shown
from scansteer.realtime.recording import Recording, read
from scansteer.realtime.reference import Reference
from scansteer.realtime.simulated import GROUP, Conditions, Simulator
from scansteer.realtime.volume import Answer, Volume

N_DRAWS = 200
CHUNK = 256
"""Voxels compared at a time."""
N_CALIBRATION_SCANS = 36
N_SIMULATED_GROUPS = 16
"""Groups of 64 voxels of like maps in a simulated scan that stands in for a measured one."""
SIMULATED_SIGMA = 5e-3
"""Its noise [fraction of M0]; the published scans have 0.4-1 %."""



def evaluate(
    path: Path | None,
    scan: Scan,
    encoder: str | None = None,
    roi: Path | None = None,
    maps: dict[str, str] | None = None,
    calibrate: bool = True,
    tell: Tell = lambda *_: None,
) -> dict[str, Any]:
    """The table of the paper at every number of images, and calibration on simulated scans.

    Parameters
    ----------
    path
        A measured scan; none: one that is simulated with voxels from the scan's priors.
    encoder
        File; none: the shipped one of that scan.

    Raises
    ------
    InputError
        Nothing to evaluate, or weights of another scan.
    """
    trained = chosen(scan, encoder)
    recording, warnings = (None, []) if path is None else read(path, scan, roi, maps)
    encoder_file.check(trained, scan, trained.mapped if recording is None else tuple(recording.maps))
    simulator = None
    if calibrate or recording is None:
        tell("simulating pulses", 0, 1)
        simulator = Simulator(scan, trained.mapped)
        recording = recording or simulated(simulator)
    images = list(compared(recording, scan, trained, tell))
    result: dict[str, Any] = {
        "scan": scan.name,
        "n_voxels": recording.signals.shape[1],
        "warnings": warnings,
        "encoder": {
            "scan": trained.scan,
            "mapped": list(trained.mapped),
            "settings": trained.about.get("settings"),
            "measured": trained.about.get("measured"),
        },
        "images": images,
    }
    if calibrate and simulator is not None:
        with ThreadPoolExecutor(2) as pool:
            result["calibration"] = calibration.calibrate(simulator, trained.encoder, 1000, N_CALIBRATION_SCANS, pool, tell)
    return result


def chosen(scan: Scan, encoder: str | None) -> Trained:
    """The encoder in a file, or the one that is shipped with the scan."""
    if encoder == "none":
        raise InputError("evaluate compares an encoder with the reference: --encoder none leaves nothing to compare.")
    trained = encoder_file.load(Path(encoder)) if encoder is not None else encoder_file.shipped(scan)
    if trained is None:
        raise InputError(
            f"No encoder is shipped for scan {scan.name!r}; train one with `scansteer train` and give it with --encoder."
        )
    return trained


def simulated(simulator: Simulator, seed: int = 2000) -> Recording:
    """A scan of the schedule: voxels from the priors, in groups whose maps are alike (as tissue's are)."""
    blocks = simulator.scan.schedule
    conditions = Conditions(blocks, SIMULATED_SIGMA, dof=1e3)
    drawn = simulator.draw(np.random.default_rng([seed, 6]), conditions, N_SIMULATED_GROUPS, simulator.expected(blocks))
    maps = {name: np.repeat(values, GROUP) for name, values in drawn.maps.items()}
    noise = [NoiseEstimate(conditions.sigma, conditions.dof)] * len(blocks)
    return Recording("simulated", blocks, range(len(blocks)), drawn.signals, noise, maps)


def compared(recording: Recording, scan: Scan, trained: Trained, tell: Tell):
    """One row per image."""
    reference = Reference(scan, list(recording.maps))
    volume = Volume(trained.encoder, columns_of(reference, trained), scan.noise.discrepancy)
    errors = {name: map_error(scan, name, values) for name, values in recording.maps.items()}
    volume.begin(voxel_columns.rows_of_voxels(volume.columns, recording.maps, errors), recording.signals.shape[1])
    reference.begin(recording.maps, recording.signals[0])
    compare = _comparison(reference, trained)
    seed = zlib.crc32(scan.name.encode())
    played = 0
    for n, (repetition, signal, noise) in enumerate(
        zip(recording.repetitions, recording.signals, recording.noise, strict=True), 1
    ):
        tell("comparing", n, len(recording.signals))
        while played < repetition:
            reference.play(recording.blocks[played], first=played == 0)
            played += 1
        expected = reference.play(recording.blocks[repetition], first=played == 0)
        info = reference.absorb(expected, signal, noise)
        played += 1
        answer = volume.absorb(np.asarray(expected), signal, noise)
        distances = _distances(compare, jax.random.fold_in(jax.random.PRNGKey(seed), n), answer.posterior, info, reference, noise.dof + n - 1)
        yield row(n, scan.parameter_names, answer, info, distances, volume.nrmse_at(info.summary.map, noise))
    reference.close()
    volume.close()


def columns_of(reference: Reference, trained: Trained) -> voxel_columns.Columns:
    """The columns of a reference's scan, with the maps that the encoder was trained for."""
    return voxel_columns.make(reference.model.axes, trained.mapped, nuisance.of_range(*bounds(reference.scan.readout.offset)))


def row(
    n: int, names: tuple[str, str], answer: Answer, info: Info, distances: dict[str, np.ndarray], nrmse_of_reference: np.ndarray
) -> dict[str, Any]:
    """Figures of one image over all voxels; those in f and k use the mean and covariance there.

    Both NRMSEs are of the same residual, with each voxel's own amplitude; what the reference reports itself (the penalty of its nuisances
    with the mean amplitude of a block of voxels) is beside them.
    """
    ours, theirs = answer.info.summary, info.summary
    meet = np.asarray(agreement.intersect(ours.lower, ours.upper, theirs.lower, theirs.upper))
    figures: dict[str, Any] = {"n": n}
    for key in ("m1", "m2"):
        figures[f"{key}_median"] = float(np.median(distances[key]))
        figures[f"{key}_over_4"] = float(np.mean(distances[key] > agreement.TOO_FAR))
        figures[f"{key}_fk_median"] = float(np.median(distances[f"{key}_fk"]))
        figures[f"{key}_fk_over_4"] = float(np.mean(distances[f"{key}_fk"] > agreement.TOO_FAR))
    figures["self_median"] = float(np.median(distances["self"]))
    figures["ci_intersect"] = {name: float(np.mean(meet[:, axis])) for axis, name in enumerate(names)}
    figures["nrmse"] = {"encoder": float(np.median(answer.info.nrmse)), "reference": float(np.median(nrmse_of_reference))}
    figures["nrmse_reported_by_reference"] = float(np.median(info.nrmse))
    figures["cr_area_ratio_median"] = float(np.median(ours.cr_area / theirs.cr_area))
    return figures


def plot(result: dict[str, Any], path: Path) -> None:
    """Distances, their share over 4, and coverage against the number of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images = [each for each in result["images"] if each["n"] >= 3]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    n = [each["n"] for each in images]
    for key, colour in (("m1", "#0072b2"), ("m2", "#d55e00")):
        left.plot(n, [each[f"{key}_median"] for each in images], color=colour, label=f"{key.upper()} median")
        middle.plot(n, [100 * each[f"{key}_over_4"] for each in images], color=colour, label=f"{key.upper()} > 4")
    left.plot(n, [each["self_median"] for each in images], color="0.5", linestyle=":", label="reference to itself")
    left.set(
        xlabel="images", ylabel="Mahalanobis distance", ylim=(0, None), title=f"{result['scan']}, {result['n_voxels']} voxels"
    )
    middle.set(xlabel="images", ylabel="share [%]", ylim=(0, None), title="distances over 4")
    for level in ("0.5", "0.8", "0.95"):
        rows = result.get("calibration", [])
        right.plot(
            [each["n"] for each in rows], [100 * each["coverage"][level] for each in rows], label=f"{float(level):.0%} region"
        )
        right.axhline(100 * float(level), color="0.8", linewidth=0.8)
    right.set(xlabel="images", ylabel="covered [%]", title="simulated scans")
    for axes in (left, middle, right):
        axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ScansteerError(f"Cannot write {path}: {error.strerror}.") from error
    pyplot.close(figure)


def _comparison(reference: Reference, trained: Trained):
    coordinate = trained.encoder.coordinate

    def compare(key, ours: Gaussian, log_posterior, power, mean, covariance) -> dict[str, jax.Array]:
        lattice = agreement.follow(log_posterior, reference.prior, coordinate, power)
        distances = agreement.compare(key, ours, lattice, N_DRAWS)
        first, second = jax.random.split(jax.random.fold_in(key, 1))
        mine = _values(coordinate, agreement.draw(first, ours, N_DRAWS))
        theirs = _values(coordinate, agreement.draw_lattice(second, lattice, N_DRAWS))
        centred = mine - jnp.mean(mine, axis=1, keepdims=True)
        spread = jnp.einsum("vdi,vdj->vij", centred, centred) / (N_DRAWS - 1)
        m1_fk, m2_fk = _mahalanobis(mine, mean, covariance), _mahalanobis(theirs, jnp.mean(mine, axis=1), spread)
        return {"m1": distances.m1, "m2": distances.m2, "self": distances.self_distance, "m1_fk": m1_fk, "m2_fk": m2_fk}

    return jax.jit(compare)


def _distances(compare, key, posterior: Gaussian, info: Info, reference: Reference, power: float) -> dict[str, np.ndarray]:
    """In chunks of one size, the last one padded."""
    n = len(posterior.mean)
    parts = []
    for start in range(0, n, CHUNK):
        rows = np.minimum(np.arange(start, start + CHUNK), n - 1)
        ours = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), posterior)
        summary = info.summary
        each = compare(
            jax.random.fold_in(key, start),
            ours,
            jnp.asarray(reference.log_posterior(rows)),
            jnp.asarray(power),
            *(jnp.asarray(leaf[rows]) for leaf in (summary.mean, summary.covariance)),
        )
        parts.append({name: np.asarray(value)[: min(CHUNK, n - start)] for name, value in each.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _values(coordinate, z: jax.Array) -> jax.Array:
    return jnp.stack([coordinate.value(axis, z[..., axis]) for axis in (0, 1)], axis=-1)


def _mahalanobis(points: jax.Array, mean: jax.Array, covariance: jax.Array) -> jax.Array:
    scale = jnp.sqrt(jnp.stack([covariance[:, 0, 0], covariance[:, 1, 1]], axis=1))
    offset = (points - mean[:, None]) / scale[:, None]
    r = covariance[:, 0, 1] / (scale[:, 0] * scale[:, 1])
    r = jnp.clip(r, -0.9999, 0.9999)[:, None]
    return jnp.sqrt(
        jnp.maximum((offset[..., 0] ** 2 - 2 * r * offset[..., 0] * offset[..., 1] + offset[..., 1] ** 2) / (1 - r**2), 0.0)
    )


def evaluate_file(path: Path | None, scan: Scan, out: Path, encoder: str | None, roi: Path | None, maps: dict[str, str]) -> None:
    """The command: figures into a JSON file, a picture beside it."""
    with shown() as tell:
        result = evaluate(path, scan, encoder, roi, maps, tell=tell)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ScansteerError(f"Cannot write {out}: {error.strerror}.") from error
    plot(result, out.with_suffix(".png"))
    worst = max(result["images"][2:] or result["images"], key=lambda each: max(each["m1_median"], each["m2_median"]))
    print(f"Wrote {out}; the worst medians are {worst['m1_median']:.2f} and {worst['m2_median']:.2f}, at n = {worst['n']} (1.18 is a perfect match).")
