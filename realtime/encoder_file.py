"""Encoder files: weights, the scan they were trained for, versions, training settings and calibration figures, in one file.

A file is a NumPy archive (no pickled objects): the arrays of the encoder's leaves, and `about`, a JSON text.
"""

from __future__ import annotations

import io
import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import encoder as encoders
from scansteer.core import lattice
from scansteer.core.coordinate import Coordinate
from scansteer.core.encoder import Encoder
from scansteer.core.errors import InputError, ScansteerError
from scansteer.core.signal_basis import Basis
from scansteer.protocols.scan import Scan

FORMAT = 5
SUFFIX = ".encoder"
MOST_REFINEMENTS = 8
FEWEST_ANCHORS, MOST_ANCHORS = 3, 32
"""Per parameter."""
UNRELATED = ("name", "description", "schema_version", "matrix", "stop", "limits")
"""Fields of a scan in which the one of a session may differ from the one of its encoder."""


class Trained(NamedTuple):
    """An encoder as it lies in a file."""

    encoder: Encoder
    scan: str
    """Name of the scan."""
    physics: dict[str, Any]
    """What of the scan the weights depend on, as JSON."""
    mapped: tuple[str, ...]
    """Auxiliaries that come as maps."""
    about: dict[str, Any]
    """Versions, settings, calibration."""


def to_bytes(trained: Trained) -> bytes:
    """What is written to a file."""
    about = {
        "format": FORMAT,
        "scan": trained.scan,
        "physics": trained.physics,
        "mapped": trained.mapped,
        "ranks": trained.encoder.basis.ranks,
        "refinements": len(trained.encoder.refine),
        "anchors": trained.encoder.n_anchors,
        **trained.about,
    }
    leaves = jax.tree.leaves(eqx.filter(trained.encoder, eqx.is_array))
    arrays = {f"leaf_{index:02d}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    packed = io.BytesIO()
    np.savez_compressed(packed, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    return packed.getvalue()


def save(path: Path, trained: Trained) -> None:
    """Write a file; an older one is replaced whole or not at all."""
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(to_bytes(trained))
        partial.replace(path)
    except OSError as error:
        raise ScansteerError(f"Cannot write {path}: {error.strerror}.") from error


def load(path: Path) -> Trained:
    """Read a file.

    Raises
    ------
    InputError
        Not readable, or not an encoder of this version.
    """
    try:
        return from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"Cannot read encoder {path}: {error.strerror}.") from error


def from_bytes(packed: bytes, source: str) -> Trained:
    """The encoder in the bytes of a file; `source` names it in errors."""
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
            about = json.loads(bytes(archive["about"]).decode())
            leaves = [archive[name] for name in sorted(archive.files) if name.startswith("leaf_")]
        if about.pop("format") != FORMAT:
            raise InputError(f"{source} is an encoder of another format than {FORMAT}; train it again with `scansteer train`.")
        name, physics = about.pop("scan"), about.pop("physics")
        mapped, ranks = (tuple(about.pop(key)) for key in ("mapped", "ranks"))
        sizes = about.pop("refinements"), about.pop("anchors")
        if not all(np.all(np.isfinite(leaf)) for leaf in leaves):
            raise InputError(f"{source} holds weights that are not finite; train it again with `scansteer train`.")
        return Trained(_filled(physics["parameters"], ranks, *sizes, leaves), name, physics, mapped, about)
    except InputError:
        raise
    except Exception as error:  # what NumPy, zipfile and JSON raise where a file is damaged has no common kind
        raise InputError(f"{source} is not an encoder, or is damaged; copy it again, or make one with `scansteer train`.") from error


def shipped(scan: Scan) -> Trained | None:
    """The encoder that comes with a built-in scan, if there is one."""
    file = resources.files("scansteer.protocols") / "encoders" / f"{scan.name}{SUFFIX}"
    return from_bytes(file.read_bytes(), file.name) if file.is_file() else None


def check(trained: Trained, scan: Scan, mapped: tuple[str, ...]) -> None:
    """Do these weights belong to this scan, with these maps?

    Raises
    ------
    InputError
        They do not: one sentence says in what the scans differ.
    """
    ours = physics_of(scan)
    different = [field for field in ours if ours[field] != trained.physics.get(field)]
    if different:
        raise InputError(
            f"The encoder belongs to scan {trained.scan!r}, whose {', '.join(different)} differ from those of scan {scan.name!r}; "
            "train one for this scan with `scansteer train`, or use --encoder none."
        )
    if set(trained.mapped) != set(mapped):
        raise InputError(
            f"The encoder of scan {scan.name!r} was trained with {_listed(trained.mapped)}, this session has {_listed(mapped)}; "
            "give the same maps, train another encoder, or use --encoder none."
        )


def physics_of(scan: Scan) -> dict[str, Any]:
    """What of a scan an encoder's weights depend on; targets of a stop are not part of it."""
    described = scan.model_dump(mode="json", exclude=set(UNRELATED))
    for parameter in described["parameters"].values():
        parameter.pop("target_halfwidth_relative")
    return described


def _listed(mapped: tuple[str, ...]) -> str:
    return f"maps of {', '.join(sorted(mapped))}" if mapped else "no maps"


def _filled(parameters: dict[str, Any], ranks: tuple[int, ...], n_refinements: int, n_anchors: int, leaves: list[np.ndarray]) -> Encoder:
    """An encoder of the right shape with the given leaves."""
    if not (1 <= n_refinements <= MOST_REFINEMENTS and FEWEST_ANCHORS <= n_anchors <= MOST_ANCHORS):
        raise ValueError(f"{n_refinements} refinements, {n_anchors} anchors")
    fraction, rate = parameters.values()
    lower, upper = ((fraction[side], rate[side]) for side in ("lower", "upper"))
    coordinate = Coordinate(lower, upper, (fraction["prior"], rate["prior"]))
    basis = Basis(jnp.zeros((sum(ranks), lattice.N_NODES**2), jnp.float32), ranks)
    # shapes alone: nothing compiles
    skeleton = eqx.filter_eval_shape(encoders.make, jax.random.PRNGKey(0), basis, coordinate, n_refinements, n_anchors)
    blank, rest = eqx.partition(skeleton, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    expected, structure = jax.tree.flatten(blank)
    if [leaf.shape for leaf in expected] != [leaf.shape for leaf in leaves]:
        raise ValueError("shapes differ")
    filled = [jnp.asarray(leaf, like.dtype) for leaf, like in zip(leaves, expected, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, filled), rest)
