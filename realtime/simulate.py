"""The body of `scansteer simulate`: what a sequence, or a scan, would measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import signal
from scansteer.core.errors import InputError
from scansteer.protocols import pulseq, pulseq_cest, tissue_model
from scansteer.protocols.scan import Scan

jax.config.update("jax_enable_x64", True)

GENERIC = ("f", "k")
"""Stand for the scan's fraction and rate."""


def simulate_sequence(sequence: str | Path, model: str | Path) -> dict[str, Any]:
    """Play a Pulseq file on a pulseq-cest model.

    Returns
    -------
    Lists over acquisitions: `mz_water`, `mxy_abs` [fraction of water's equilibrium], and `offset_ppm`, null where the file gives none.
    """
    played = pulseq.load(sequence)
    return dict(pulseq_cest.simulate(played, pulseq_cest.load_model(model), str(sequence)))


def simulate_scan(scan: Scan, values: Mapping[str, float]) -> dict[str, Any]:
    """Noise-free images of one voxel.

    Parameters
    ----------
    values
        By name: the scan's parameters (or f and k), its auxiliaries, and "<pool>_t2_s"; what is missing is the centre of its range.

    Returns
    -------
    Lists over images: `mz_water`, water's Mz where the readout encodes the contrast; `mxy_abs`, what its flip angle makes of it, both as a
    fraction of equilibrium; `offset_ppm` of the saturation.
    """
    named = _resolve(scan, values)
    tissue = tissue_model.tissue(scan, {name: jnp.asarray(value, float) for name, value in named.items()})
    readout, train = tissue_model.readout(scan), tissue_model.train(scan)
    played = [scan.schedule[0]] * scan.first_state.n_dummies + list(scan.schedule)
    # the first state is that just before the first saturation
    played[0] = played[0].model_copy(update={"t_rec_s": 0.0})
    blocks = list(dict.fromkeys(played))
    saturations = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tissue_model.saturation(scan, block) for block in blocks))
    initial = tissue_model.centre(scan.first_state.mz) * signal.equilibrium(tissue)
    order = np.array([blocks.index(block) for block in played])
    mz = jax.jit(signal.signals, static_argnames="train")(tissue, saturations, train=train, readout=readout, initial=initial, index=order)
    mz = np.asarray(mz)[scan.first_state.n_dummies :] + tissue_model.centre(scan.readout.offset)
    flip = float(readout.flip_angle) * float(tissue.b1)
    return {
        "mz_water": mz.tolist(),
        "mxy_abs": np.abs(mz * np.sin(flip)).tolist(),
        "offset_ppm": [block.offset_ppm for block in scan.schedule],
    }


def _resolve(scan: Scan, values: Mapping[str, float]) -> dict[str, float]:
    """Values under the scan's own names."""
    own: dict[str, str] = dict(zip(GENERIC, scan.parameter_names, strict=True))
    known = {*scan.parameters, *scan.auxiliaries, *map(tissue_model.pool_t2_name, scan.pools), *tissue_model.WITHOUT_MAP}
    resolved: dict[str, float] = {}
    for name, value in values.items():
        target = own.get(name, name)
        if target not in known:
            raise InputError(f"--set {name}: scan {scan.name!r} has no such quantity; it has {', '.join(sorted({*known, *own}))}.")
        if target in resolved:
            raise InputError(f"--set {name}: {target} is given twice; give it once.")
        if not np.isfinite(value):
            raise InputError(f"--set {name}: {value} is not a finite number.")
        if (value < 0 and target != "b0_ppm") or (value == 0 and target.endswith("_s")):
            raise InputError(f"--set {name}: {value:g} is out of range; fractions, rates and times cannot be negative, nor times zero.")
        resolved[target] = value
    return resolved
