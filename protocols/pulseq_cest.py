"""pulseq-cest: its YAML models, and the simulation of a Pulseq sequence with one of them.

Units in the YAML: s, fraction of water, 1/s (pool -> water), ppm, tesla, rad/s/uT.

Herz K et al. Pulseq-CEST: towards multi-site multi-vendor compatibility and reproducibility of CEST experiments using an open-source
sequence standard. Magn Reson Med 86 (2021), doi:10.1002/mrm.28825.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scansteer.core import events as core_events
from scansteer.core import tissue as core_tissue
from scansteer.core.bloch_mcconnell import n_transverse
from scansteer.core.errors import InputError
from scansteer.protocols import scan as description
from scansteer.protocols.pulseq import SILENT_HZ, Block, Pulse, Sequence

ALIASES = {"b0_inhomogeneity": "b0_inhom", "relb1": "rel_b1", "max_samples": "max_pulse_samples"}
LINESHAPES = {"lorentzian": "lorentzian", "superlorentzian": "super-lorentzian", "none": "none"}
AMPLITUDE_LIMIT_HZ = 100_000.0
"""RF stronger than this (2.3 mT) is a slip of units, not a pulse."""
MAX_CHARACTERS = 100_000
MAX_EVENTS = 20_000_000
MAX_MAPS_BYTES = 2 * 2**30

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Pool(_Part):
    """One pool; T1 and T2 may be given as rates r1, r2."""

    f: NonNegative
    t1: Positive
    t2: Positive

    @model_validator(mode="before")
    @classmethod
    def _rates_to_times(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            for rate, time in (("r1", "t1"), ("r2", "t2")):
                if rate in data and time not in data:
                    data[time] = _inverse(rate, data.pop(rate))
        return data


def _inverse(rate: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"{rate} must be a positive number, got {value!r}")
    return 1 / number


class ExchangingPool(Pool):
    k: NonNegative
    dw: float


class MtPool(ExchangingPool):
    lineshape: Annotated[Literal["lorentzian", "superlorentzian", "none"], BeforeValidator(lambda value: str(value).lower())]


class CestModel(BaseModel):
    """A pulseq-cest model."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    water_pool: Pool
    cest_pool: dict[str, ExchangingPool] = {}
    mt_pool: MtPool | None = None
    b0: Positive
    gamma: Positive = description.GAMMA_RAD_PER_S_PER_T * 1e-6
    b0_inhom: float = 0.0
    rel_b1: NonNegative = 1.0
    reset_init_mag: bool = True
    scale: Annotated[float, Field(ge=0, le=1)] = 1.0
    max_pulse_samples: Annotated[int, Field(ge=1)] = 500

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {ALIASES.get(key, key): value for key, value in data.items()}
        return {key: value for key, value in data.items() if not (key in ("cest_pool", "mt_pool") and not value)}

    @model_validator(mode="after")
    def _water_is_the_unit(self) -> CestModel:
        if self.water_pool.f != 1:
            raise ValueError(f"water_pool.f is {self.water_pool.f:g}; fractions are relative to water, so it must be 1")
        return self

    @property
    def hz_per_ppm(self) -> float:
        return self.gamma * self.b0 / (2 * math.pi)


def load_model(path: str | Path) -> CestModel:
    """Read a pulseq-cest YAML model.

    Raises
    ------
    InputError
        One sentence naming the file and the field.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        data = yaml.safe_load(text) if len(text) <= MAX_CHARACTERS else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read model {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"Model {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise InputError(f"Model {path} is not a pulseq-cest model: expected water_pool, cest_pool, b0 and the like.")
    try:
        return CestModel.model_validate(data)
    except ValidationError as error:
        raise InputError(f"Model {path}: {description.explain(error, 'docs/simulate-a-sequence.md')}") from error


def tissue(model: CestModel) -> core_tissue.Tissue:
    """The model's tissue; all leaves scalar.

    `b0_inhom` moves every resonance to its negative, water's and the pools' alike, as in open-py-cest-mrf. (pulseq-cest and BMCTool move
    water one way and the pools the other.)
    """
    scalar = lambda value: jnp.asarray(value, float)  # noqa: E731
    hz = model.hz_per_ppm
    pools = [_pool(pool, hz, "bloch") for pool in model.cest_pool.values()]
    if model.mt_pool is not None:
        pools.append(_pool(model.mt_pool, hz, LINESHAPES[model.mt_pool.lineshape]))
    water = model.water_pool
    return core_tissue.Tissue(
        t1=scalar(water.t1), t2=scalar(water.t2), pools=tuple(pools), b0_hz=scalar(-model.b0_inhom * hz), b1=scalar(model.rel_b1)
    )


def _pool(pool: ExchangingPool, hz: float, lineshape: str) -> core_tissue.Pool:
    t2 = 0.0 if lineshape == "none" else pool.t2  # a Lorentzian of T2 = 0 absorbs nothing
    leaves = (jnp.asarray(value, float) for value in (pool.f, pool.k, pool.t1, t2, pool.dw * hz))
    return core_tissue.Pool(*leaves, lineshape="lorentzian" if lineshape == "none" else lineshape, cutoff_hz=hz)  # type: ignore[arg-type]


def scan_pools(model: CestModel, parameters: tuple[str, str], pool: str) -> tuple[description.Pool, ...]:
    """The model's pools as those of a `Scan`.

    Parameters
    ----------
    parameters
        Names that fraction and exchange rate of `pool` get, e.g. ("fs", "ksw"); all else is taken over as numbers.
    pool
        Name of the pool of interest: a key of cest_pool, or "mt".
    """
    named: dict[str, ExchangingPool] = dict(model.cest_pool)
    if model.mt_pool is not None:
        named["mt"] = model.mt_pool
    if pool not in named:
        raise InputError(f"The model has no pool {pool!r}; it has {', '.join(named) or 'none'}.")
    return tuple(_scan_pool(name, one, parameters if name == pool else (one.f, one.k)) for name, one in named.items())


def _scan_pool(name: str, pool: ExchangingPool, values) -> description.Pool:
    lineshape: Any = "bloch"
    if isinstance(pool, MtPool):
        lineshape = LINESHAPES[pool.lineshape]
        if lineshape == "none":
            raise InputError("mt_pool has no lineshape; a scan's semisolid pool needs Lorentzian or SuperLorentzian.")
    kind = "semisolid" if isinstance(pool, MtPool) else "solute"
    return description.Pool(
        name=name, kind=kind, offset_ppm=pool.dw, f=values[0], k_per_s=values[1], t1_s=pool.t1, t2_s=pool.t2, lineshape=lineshape
    )


def simulate(sequence: Sequence, model: CestModel, source: str = "sequence") -> dict[str, list[float] | list[float | None] | None]:
    """Play a sequence on a model.

    Returns
    -------
    Lists over acquisitions: `mz_water` and `mxy_abs` (of water), in units of water's equilibrium, and `offset_ppm`, null where the sequence
    does not define one per acquisition.
    """
    if sequence.n_acquired == 0:
        raise InputError(f"{source} has no acquisition (ADC): there is nothing to report.")
    body = tissue(model)
    events = to_events(sequence, model, source)
    initial = core_events.initial_state(body, model.scale)
    _check_memory(events, initial.size, source)
    state = np.asarray(_simulate(body, events, initial))
    n = n_transverse(body)
    if not np.isfinite(state).all():
        raise InputError(f"{source} cannot be simulated with this model: the result is not finite; check its times, rates and amplitudes.")
    return {
        "mz_water": state[:, 2 * n].tolist(),
        "mxy_abs": np.hypot(state[:, 0], state[:, n]).tolist(),
        "offset_ppm": sequence.offsets_ppm(),
    }


_simulate = jax.jit(core_events.simulate)


def to_events(sequence: Sequence, model: CestModel, source: str = "sequence") -> core_events.Events:
    """Flatten a sequence into steps of constant RF, the accumulated RF phase taken off exactly."""
    rows: list[np.ndarray] = []
    accumulated, n_events = 0.0, 0
    steps: dict[tuple, tuple] = {}
    for number, block in enumerate(sequence.blocks, start=1):
        if block.acquires:
            rows.append(_row(0.0, acquire=True, reset=model.reset_init_mag))
        elif block.pulse is not None:
            pulse = block.pulse
            _check_amplitude(pulse, number, source)
            if pulse.key not in steps:
                steps[pulse.key] = decimate(pulse, model.max_pulse_samples)
            rows.append(_play(pulse, steps[pulse.key], accumulated, block))
            accumulated = math.fmod(accumulated + 2 * math.pi * pulse.frequency_hz * pulse.length_s, 2 * math.pi)
        else:
            rows.append(_row(block.duration_s, spoil=block.spoils))
        n_events += rows[-1].shape[1]
        if n_events > MAX_EVENTS:
            raise InputError(f"{source} takes more than {MAX_EVENTS} steps to play; give the model a smaller max_pulse_samples.")
    return core_events.make_events(*np.concatenate(rows, axis=1))


def _check_memory(events: core_events.Events, n_rows: int, source: str) -> None:
    """One map per distinct step is kept."""
    n_steps = events.steps.duration.size
    size = 8 * n_steps * n_rows * (n_rows + 1)
    if size > MAX_MAPS_BYTES:
        raise InputError(f"{source} has {n_steps} distinct steps, {size / 2**30:.1f} GiB of maps; give the model a smaller max_pulse_samples.")


def _row(duration: float, spoil: bool = False, acquire: bool = False, reset: bool = False) -> np.ndarray:
    """One event without RF; columns as in `make_events`."""
    return np.array([[duration], [0.0], [0.0], [0.0], [spoil], [acquire], [reset]], float)


def _check_amplitude(pulse: Pulse, number: int, source: str) -> None:
    peak = float(np.abs(pulse.amplitude_hz).max(initial=0.0))
    if not peak <= AMPLITUDE_LIMIT_HZ:
        raise InputError(f"{source}: the RF of block {number} reaches {peak:g} Hz; above {AMPLITUDE_LIMIT_HZ:g} Hz it is no pulse, check the units.")


def _play(pulse: Pulse, steps: tuple, accumulated: float, block: Block) -> np.ndarray:
    """Dead time, steps, ring-down. Phases within a shape count backwards, as in pulseq-cest; those of the event forwards."""
    duration, amplitude, turn = steps
    rf = np.zeros((7, duration.size))
    rf[0], rf[1], rf[2] = duration, amplitude, pulse.frequency_hz
    rf[3] = -turn + pulse.phase_rad - accumulated
    rest = block.duration_s - pulse.delay_s - pulse.length_s
    before = [_row(pulse.delay_s)] if pulse.delay_s > 0 else []
    after = [_row(rest)] if rest > 1e-12 else []
    return np.concatenate([*before, rf, *after], axis=1)


def decimate(pulse: Pulse, max_samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Durations, amplitudes and phases of a pulse's steps, thinned as pulseq-cest does.

    Of more than `max_samples` samples, N from the first that is not silent to the last, every ceil(N / max_samples)-th is held until the next; the
    last is cut so that the pulse keeps its length. Constant RF is one step in any case.
    """
    duration, amplitude, turn = pulse.duration_s, pulse.amplitude_hz, pulse.shape_phase_rad
    ends = np.round(np.cumsum(duration) / pulse.dwell_s).astype(int)
    first = int(np.argmax(np.abs(amplitude) > SILENT_HZ)) if amplitude.size else 0
    start = int(ends[first - 1]) if first else 0
    if duration.size - first <= 1 or ends[-1] - start <= max_samples:
        return duration, amplitude, turn
    stride = math.ceil((ends[-1] - start) / max_samples)
    taken = np.arange(start, ends[-1], stride)
    step = np.searchsorted(ends, taken, side="right")
    held = np.diff(np.append(taken, ends[-1])).astype(float) * pulse.dwell_s
    thinned = held, amplitude[step], turn[step]
    silence = np.array([start * pulse.dwell_s]), np.zeros(1), np.zeros(1)
    return tuple(map(np.concatenate, zip(silence, thinned, strict=True))) if start else thinned  # type: ignore[return-value]
