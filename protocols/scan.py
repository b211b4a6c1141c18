"""The `Scan`: everything that is known, or known to be unknown, about one acquisition before it starts.

A `Scan` is data (YAML in and out). Units stand in the field names: microtesla, ppm of the field, seconds, degrees.
Volume fractions are relative to the water protons; exchange rates go from the pool to water.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from scansteer.core.errors import InputError

GAMMA_RAD_PER_S_PER_T = 267.5153e6
"""Proton gyromagnetic ratio [rad/s/T], the value used by pulseq-cest and by the publishers of the reference scans."""

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
_ABOVE_ZERO = "t1_s", "t2_s", "b1_relative"
"""Auxiliaries of which nothing at or below zero exists."""


class Model(BaseModel):
    """Base of all descriptions: unknown fields, NaN and infinity are refused; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Range(Model):
    """A quantity that was not measured: uniform between two values."""

    lower: float
    """In the unit of what it is a range of."""
    upper: float
    """Equal to `lower`: known."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.lower <= self.upper:
            raise ValueError(f"lower ({self.lower:g}) must not exceed upper ({self.upper:g})")
        return self

    @property
    def centre(self) -> float:
        return 0.5 * (self.lower + self.upper)


def _kind(value: object) -> str:
    return "range" if isinstance(value, dict | Range) else "number"


_RANGE = Annotated[Range, Tag("range")]
_NumberOrRange = Annotated[Annotated[float, Tag("number")] | _RANGE, Discriminator(_kind)]
"""Told apart first, so that the complaint is of what was meant."""
_PositiveOrRange = Annotated[Annotated[Positive, Tag("number")] | _RANGE, Discriminator(_kind)]


class Auxiliary(Range):
    """A tissue or field quantity that may be mapped before the scan: its range, and how wrong a map of it may be.

    Without a map the quantity is marginalised, uniform over the range. With a map, over a Gaussian about the map's value
    with standard deviation `map_error` (same unit) plus `map_error_relative` times the value, added in quadrature.
    """

    map_error: NonNegative = 0.0
    """Standard deviation of a map of it, in its own unit."""
    map_error_relative: NonNegative = 0.0
    """The same, as a share of the value."""


class Parameter(Range):
    """One of the two quantities the scan is for: its box, its prior and its clinical target."""

    prior: Literal["uniform", "log-uniform", "beta"] = "uniform"
    """`beta`: Beta(2, 2) over the box, a parabola that vanishes at both ends."""
    target_halfwidth_relative: Positive = 0.2
    """Stop target: half of the 95 % confidence interval, relative to the estimate."""

    @model_validator(mode="after")
    def _log_needs_positive(self) -> Parameter:
        if self.lower < 0 or self.upper <= self.lower:
            raise ValueError(f"needs 0 <= lower < upper, got {self.lower:g} and {self.upper:g}")
        if self.prior == "log-uniform" and self.lower <= 0:
            raise ValueError("a log-uniform prior needs lower > 0")
        return self

    @property
    def prior_sd(self) -> float:
        """Standard deviation of the prior, in the parameter's unit."""
        width = self.upper - self.lower
        if self.prior == "log-uniform":
            octaves = math.log(self.upper / self.lower)
            return math.sqrt((self.upper**2 - self.lower**2) / (2 * octaves) - (width / octaves) ** 2)
        return width / math.sqrt(20 if self.prior == "beta" else 12)


class Pool(Model):
    """A proton pool that exchanges with water."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    """What it is called in messages; each pool has its own."""
    kind: Literal["solute", "semisolid"]
    """A semisolid is described with an absorption line of its own (`lineshape`)."""
    offset_ppm: float
    """Chemical shift from water, positive on the amide side [ppm]."""
    f: float | str
    """Volume fraction: a number, or the name of a parameter or auxiliary."""
    k_per_s: float | str
    """Exchange rate pool -> water [1/s]: a number, or the name of a parameter or auxiliary."""
    t1_s: Positive | None = None
    """T1 of the pool [s]; none: that of water."""
    t2_s: _PositiveOrRange
    """T2 of the pool [s]; a range is marginalised."""
    lineshape: Literal["bloch", "lorentzian", "super-lorentzian"] = "bloch"
    """`bloch`: full x-y-z magnetisation (a Lorentzian); the others: z only with that absorption line (semisolid)."""


    @model_validator(mode="after")
    def _is_possible(self) -> Pool:
        if not isinstance(self.f, str) and not 0 <= self.f <= 1:
            raise ValueError(f"f of pool {self.name!r} must lie within 0 .. 1 of the water protons, got {self.f:g}")
        if not isinstance(self.k_per_s, str) and self.k_per_s < 0:
            raise ValueError(f"k_per_s of pool {self.name!r} must not be negative, got {self.k_per_s:g}")
        if isinstance(self.t2_s, Range) and self.t2_s.lower <= 0:
            raise ValueError(f"t2_s of pool {self.name!r} must be positive, got a range from {self.t2_s.lower:g}")
        return self


class SaturationBlock(Model):
    """One repetition's preparation: recover, then saturate; the readout follows at once."""

    b1_ut: NonNegative
    """Saturation amplitude (for a pulse train: of each pulse) [uT]; 0 means no saturation at all."""
    offset_ppm: float
    """Of the pulse from water, positive on the amide side [ppm]."""
    t_sat_s: NonNegative
    """From the start of the first to the end of the last saturation pulse [s]; free precession when b1_ut is 0."""
    t_rec_s: NonNegative
    """Free recovery between the previous readout and the saturation [s]; that of the first block played, dummy or image, is skipped."""

    @property
    def duration_s(self) -> float:
        return self.t_sat_s + self.t_rec_s


class Train(Model):
    """How the saturation time is filled with RF."""

    n_pulses: Annotated[int, Field(ge=1, le=1000)] = 1
    """Pulses that share the saturation time; 1: continuous wave."""
    duty_cycle: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Pulse length over pulse spacing; the pause after the last pulse does not belong to the block."""
    spin_lock: bool = False
    """Tip water onto the effective field before, and back after each pulse."""
    shape: Literal["block", "gauss"] = "block"
    """Of every pulse; `gauss`: its root-mean-square over the pulse is the amplitude."""

    @model_validator(mode="after")
    def _cw_is_full(self) -> Train:
        if self.n_pulses == 1 and self.duty_cycle != 1:
            raise ValueError("a single pulse fills the block: duty_cycle must be 1")
        return self


class Readout(Model):
    """What one image does to the magnetisation, and what it measures: amplitude x (water Mz + offset)."""

    flip_deg: Annotated[float, Field(gt=0, le=180)]
    """Of every excitation [degrees]."""
    n_shots: Annotated[int, Field(ge=1, le=4096)] = 1
    """Excitations of one image."""
    shot_spacing_s: NonNegative = 0.0
    """From one excitation to the next [s]."""
    carry_over: _NumberOrRange | None = None
    """Share of every pool's Mz that the readout leaves; none: cos(flip)^n_shots (spoiled, relaxation between shots added)."""
    offset: _NumberOrRange = 0.0
    """Signal added to every image, as a fraction of M0."""
    encoded_shot: Annotated[int, Field(ge=0)] = 0
    """Index of the shot that reads the centre of k-space, hence the contrast (0: centre-out)."""

    @field_validator("carry_over")
    @classmethod
    def _within_one(cls, value: float | Range | None) -> float | Range | None:
        low, high = bounds(value) if value is not None else (0.0, 0.0)
        if low < -1 or high > 1:
            raise ValueError(f"carry_over must lie within -1 .. 1, got {low:g} .. {high:g}")
        return value

    @model_validator(mode="after")
    def _reads_one_of_its_shots(self) -> Readout:
        if self.encoded_shot >= self.n_shots:
            raise ValueError(f"encoded_shot counts from 0 and must be less than n_shots = {self.n_shots}, got {self.encoded_shot}")
        return self


class FirstState(Model):
    """Magnetisation just before the first saturation of all, that of the first dummy if there are any, as a fraction of equilibrium in every pool."""

    mz: _NumberOrRange = 1.0
    """Share of equilibrium, -1 .. 1; a range is marginalised."""
    n_dummies: Annotated[int, Field(ge=0, le=1000)] = 0
    """Repetitions of the first block played, and not sent, before image 0."""

    @field_validator("mz")
    @classmethod
    def _within_equilibrium(cls, value: float | Range) -> float | Range:
        low, high = bounds(value)
        if low < -1 or high > 1:
            raise ValueError(f"mz must lie within -1 .. 1 of equilibrium, got {low:g} .. {high:g}")
        return value


class Noise(Model):
    """What is known of the noise, and of the model, before the scan."""

    sigma: Positive | None = None
    """Standard deviation of one pixel from the scan's own measurement [pixel units]; none: learnt from the images."""
    effective_voxel_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Independent voxels per voxel (reconstruction filters correlate neighbours)."""
    discrepancy: NonNegative = 0.0
    """Prior standard deviation of the model's error per image [fraction of M0], the same in all voxels."""


class Stop(Model):
    """When the scan has said enough."""

    n_min: Annotated[int, Field(ge=2)] = 6
    """No stop before this many images."""
    confirmations: Annotated[int, Field(ge=1)] = 2
    """Consecutive images at which the target must be met."""
    fraction_converged: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a region's voxels whose intervals must meet the targets."""
    plateau_nat: Positive | None = None
    """Stop, targets met or not, once the rest of the schedule is expected to take less than this off the log confidence-region area
    [nat]; none: never."""
    operator_confirmation: bool = False
    """A stop is proposed and waits for the operator's confirmation; off: it is called. (Whether a called stop is obeyed is the controller's
    business: by default it only advises.)"""

    @property
    def earliest(self) -> int:
        """The least number of images at which a stop can be called: images before the `n_min`-th count as confirmations."""
        return max(self.n_min, self.confirmations)


class Limits(Model):
    """What the hardware and the SAR supervision allow; a suggestion never leaves it."""

    b1_max_ut: Positive
    """Largest amplitude [uT]."""
    offset_ppm: Range
    """Offsets that may be suggested [ppm]; the approved schedule may leave them."""
    t_sat_s: Range
    """Saturation times that may be suggested [s]."""
    t_rec_s: Range
    """Recovery times that may be suggested [s]."""
    duty_cycle_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    """RF-on time over repetition time."""
    b1rms_10s_ut: Positive
    """Largest root-mean-square amplitude over any 10 s [uT]."""
    b1rms_6min_ut: Positive
    """The same over any 6 min [uT]."""

    @field_validator("t_sat_s", "t_rec_s")
    @classmethod
    def _lasts(cls, value: Range) -> Range:
        if value.lower < 0:
            raise ValueError(f"a time must not be negative, got a range from {value.lower:g} s")
        return value


class Scan(Model):
    """One acquisition: field, pools, parameters, schedule, readout, first state, auxiliaries, noise, targets, limits."""

    schema_version: Literal[1] = 1
    """Of this description."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """By which decisions, maps and services call it."""
    description: str = ""
    """For people."""
    field_t: Annotated[float, Field(gt=0, le=30)]
    """Strength of the magnet [T]."""
    matrix: tuple[Count, Count, Count] | None = None
    """Expected image matrix (x, y, z); none accepts any."""
    pools: Annotated[tuple[Pool, ...], Field(min_length=1, max_length=7)]
    """What exchanges with water, which is not listed."""
    parameters: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")], Parameter]
    """The volume fraction first, the exchange rate second."""
    schedule: Annotated[tuple[SaturationBlock, ...], Field(min_length=1, max_length=1000)]
    """The approved pulses, one for each image."""
    train: Train = Train()
    """How each saturation is filled."""
    readout: Readout
    """What every image does and reads."""
    first_state: FirstState = FirstState()
    """What the first saturation meets."""
    auxiliaries: dict[Literal["t1_s", "t2_s", "b0_ppm", "b1_relative", "fss", "kssw"], Auxiliary]
    """T1 and T2 of water [s], B0 off resonance [ppm], B1 over nominal; fraction and rate [1/s] of a semisolid beside the parameters."""
    noise: Noise = Noise()
    """Of images and model."""
    stop: Stop = Stop()
    """When it has said enough."""
    limits: Limits
    """Of what may be suggested."""

    @model_validator(mode="after")
    def _names_resolve(self) -> Scan:
        if len(self.parameters) != 2:
            raise ValueError(f"parameters: exactly two are expected (a fraction, then a rate), got {list(self.parameters)}")
        for required in ("t1_s", "t2_s"):
            if required not in self.auxiliaries:
                raise ValueError(f"auxiliaries: {required} of water is missing; give its range")
        for name, span in self.auxiliaries.items():
            if span.lower <= 0 and name in _ABOVE_ZERO:
                raise ValueError(f"auxiliaries: {name} must be positive, got a range from {span.lower:g}")
            if span.lower < 0 and name != "b0_ppm":
                raise ValueError(f"auxiliaries: {name} must not be negative, got a range from {span.lower:g}")
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pools: {max(names, key=names.count)!r} occurs twice; give every pool a name of its own")
        known = {*self.parameters, *self.auxiliaries}
        used: set[str] = set()
        for pool in self.pools:
            for field, value in (("f", pool.f), ("k_per_s", pool.k_per_s)):
                if isinstance(value, str):
                    used.add(value)
                    if value == list(self.parameters)[field == "f"]:
                        raise ValueError(f"parameters: pool {pool.name!r} uses {value!r} as {field}; the fraction is listed first, the rate second")
                    if value not in known:
                        raise ValueError(f"pools: {field} of pool {pool.name!r} names {value!r}, which is neither a parameter nor an auxiliary")
        unused = [name for name in self.parameters if name not in used]
        if unused:
            raise ValueError(f"parameters: no pool uses {unused[0]!r}")
        if (fraction := next(iter(self.parameters.values()))).upper > 1:
            raise ValueError(f"parameters: a volume fraction is at most 1, got a box up to {fraction.upper:g}")
        for number, block in enumerate(self.schedule):
            self._check_block(number, block)
        return self

    def _check_block(self, number: int, block: SaturationBlock) -> None:
        if block.b1_ut > self.limits.b1_max_ut:
            raise ValueError(f"schedule: block {number} asks for {block.b1_ut:g} uT, above limits.b1_max_ut = {self.limits.b1_max_ut:g} uT")
        if block.duration_s <= 0:
            raise ValueError(f"schedule: block {number} takes no time (t_sat_s + t_rec_s = 0)")

    @property
    def parameter_names(self) -> tuple[str, str]:
        fraction, rate = self.parameters
        return fraction, rate

    @property
    def larmor_hz_per_ppm(self) -> float:
        """Hertz in one ppm of the field."""
        return GAMMA_RAD_PER_S_PER_T * self.field_t / (2 * math.pi) * 1e-6


def bounds(value: float | Range) -> tuple[float, float]:
    """(lower, upper) of a number or a range."""
    return (value.lower, value.upper) if isinstance(value, Range) else (value, value)


class _GivenTwiceError(yaml.YAMLError):
    """A key of one mapping."""


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loader takes the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _GivenTwiceError(f"key {key.value!r} is given twice, again in line {key.start_mark.line + 1}; keep one")
            seen.add(key.value)
        return node


def from_yaml(text: str, source: str = "scan") -> Scan:
    """Parse a `Scan`.

    Raises
    ------
    InputError
        One sentence naming the source, the field and the value.
    """
    try:
        data = yaml.load(text, _UniqueKeys)
    except _GivenTwiceError as error:
        raise InputError(f"{source}: {error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: a date that is none, nested without end
        raise InputError(f"{source} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise InputError(f"{source} does not describe a scan: expected a mapping of fields; `scansteer scans export` writes one to start from.")
    try:
        return Scan.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{source}: {explain(error)}") from error


def explain(error: ValidationError, reference: str = "`scansteer scans show --schema`") -> str:
    """The first complaint of a pydantic validation in one sentence, with the number of further ones and where the fields are described."""
    first, *others = error.errors()
    field = ".".join(str(part) for part in first["loc"] if part not in ("number", "range"))
    if first["type"] == "extra_forbidden":
        text = f"unknown field {field!r}; remove it or compare with {reference}"
    elif first["type"] == "missing":
        text = f"field {field!r} is missing; see {reference}"
    else:
        shown = repr(first.get("input"))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        text = f"field {field!r}: " if field else ""
        text += first["msg"].removeprefix("Value error, ") + ("" if isinstance(first.get("input"), dict) else f" (got {shown})")
    return text + (f" (and {len(others)} more)." if others else ".")


def to_yaml(scan: Scan) -> str:
    """The YAML text of a scan; `from_yaml` gives the same scan back."""
    return yaml.safe_dump(scan.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True, width=130)


def load(name_or_path: str) -> Scan:
    """A built-in scan by name, or a scan file by path.

    Raises
    ------
    InputError
        Neither a built-in name nor a readable YAML file.
    """
    from scansteer.protocols.builtin import BUILTIN  # built-in scans are made of this module's models

    if name_or_path in BUILTIN:
        return BUILTIN[name_or_path]  # type: ignore[return-value] - one class under two names for a checker of the source tree
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return from_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Cannot read scan file {path}: {error}.") from error
    raise InputError(f"Unknown scan {name_or_path!r}: neither built in ({', '.join(sorted(BUILTIN))}) nor a YAML file.")
