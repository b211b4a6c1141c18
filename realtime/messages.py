"""What travels and what is written down: the `Decision` and the messages of the wire, one frozen model each.

Shares, NRMSEs and relative widths are fractions; confidence-region areas are in f x 1/s; undefined is null, never NaN.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1


class Message(BaseModel):
    """Base of everything that travels: frozen; unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ParameterReport(Message):
    """One parameter over one region's voxels."""

    median: float | None
    """Median over voxels of the joint MAP."""
    ci_lower: float | None
    ci_upper: float | None
    """Medians over voxels of the marginal equal-tailed 95 % interval."""
    ci_halfwidth_relative: float | None
    """Median over voxels of half the interval's length over the MAP."""
    fraction_prior_limited: float
    """Voxels whose posterior leans on an edge of the box; they never count as converged."""
    fraction_not_identifiable: float = 0.0
    """Voxels whose images leave more than 0.8 of the prior's standard deviation; they never count as converged."""


class MeanParameterReport(Message):
    """One parameter of a region's mean signal."""

    estimate: float | None
    """Joint MAP."""
    ci_lower: float | None
    ci_upper: float | None
    ci_halfwidth_relative: float | None
    is_prior_limited: bool
    is_not_identifiable: bool = False


class MeanReport(Message):
    """The posterior of a voxel that reads the mean of its region."""

    n_independent: float
    """Independent voxels behind the mean."""
    parameters: dict[str, MeanParameterReport]
    cr_area: float | None
    nrmse: float | None


class RegionReport(Message):
    """What is known of one region of interest."""

    name: str
    n_voxels: int
    parameters: dict[str, ParameterReport]
    cr_area_median: float | None
    cr_area_p90: float | None
    cr_shrinkage: float | None
    """Median area over the median area at the previous image."""
    anytime_area_median: float | None
    fraction_converged: float
    """Of the voxels that did not move; of all where more than a fifth did."""
    fraction_moved: float = 0.0
    """Voxels that were found to hold other tissue than before. Medians and shares leave them out, unless they are more than a fifth of the region:
    then they count as not converged."""
    fraction_unexplained: float = 0.0
    """Voxels of which the model, each by itself, leaves more than noise does in all but one of a thousand; they do not count as converged."""
    mean_signal: MeanReport | None = None
    """Of the region as a whole: its noise averages out, what its voxels share does not. Stops do not look at it."""


class Pulse(Message):
    """A saturation block, as played or as suggested."""

    b1_ut: float
    offset_ppm: float
    t_sat_s: float
    t_rec_s: float


class SuggestedPulse(Pulse):
    """The saturation block most worth playing next."""

    expected_gain: float
    """Expected reduction of the log confidence-region area, mean over the sampled voxels [nat]."""


class LackOfFit(Message):
    """Does the model describe the images: were they as predicted before they were absorbed, is what the fit leaves no more than noise, and does
    what was not measured lie where the scan says?"""

    statistic: float | None
    """Residual variance over noise (and allowed discrepancy), median over voxels."""
    passed: bool
    prediction: float | None = None
    """Squared error of the predictions over what was expected of it, mean over the images so far: 1 if the model holds."""
    outside: str | None = None
    """What was not measured (`b0_ppm`, ..), and may lie beyond the range that the scan states; looked for where a stop is near or the model does not
    fit, and kept."""
    region: str | None = None
    """The region that was first found not to fit though all voxels together did; kept."""


class Gains(Message):
    """What going on is expected to take off the logarithm of the confidence region's area, and so what stopping forgoes; mean over the sampled voxels
    [nat]."""

    best: float | None
    """By the candidate that is expected to tell most, whatever it costs; 0 where limits and quota leave none."""
    scheduled: float | None
    """By the schedule's next block; 0 at its end."""
    remaining: float | None
    """By the rest of the schedule together, at most 48 images: the gain that stopping now gives up."""


class Audit(Message):
    """Encoder against reference, on a sample of voxels."""

    n_voxels: int
    m1_median: float
    m2_median: float
    fraction_over_4: float


class Latency(Message):
    """Where the time went [ms]."""

    receive: float
    update: float
    decide: float
    total: float


DecisionCause = Literal["veto", "target", "few-images", "confirming", "operator", "converged", "plateau"]
"""As `core.stopping.Cause` says. `operator`: a stop is proposed and waits for the command `confirm`; with the action stop: it came."""


class Decision(Message):
    """What scansteer says after one image."""

    schema_version: Literal[1] = SCHEMA_VERSION
    session_id: str
    sequence_number: int
    """Of decisions in this session, from 0, no gaps."""
    repetition: int
    """0-based place in the played sequence of the image that led to this decision."""
    n_images: int
    """Images absorbed so far."""
    n_planned: int
    action: Literal["continue", "stop"]
    reason: str
    cause: DecisionCause | None = None
    """The reason by name."""
    would_stop_at: int | None
    regions: tuple[RegionReport, ...]
    next_pulse: SuggestedPulse | None
    gains: Gains | None = None
    lack_of_fit: LackOfFit
    posterior_source: Literal["reference", "encoder"]
    audit: Audit | None
    valid_until_repetition: int
    """Void once this repetition has begun: continue the approved schedule."""
    latency_ms: Latency
    margin_ms: float | None
    """Time left to act before the next repetition's first pulse."""
    warnings: tuple[str, ...] = ()
    """What the session noticed and did about it, one sentence each."""


# ---------------------------------------------------------------------------------------------------------------------
# The wire. A message is one msgpack envelope (these models), followed by zero or more bodies, each a frame of its own.
# ---------------------------------------------------------------------------------------------------------------------

PROTOCOL_VERSION = 1

SessionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""Chosen by whoever opens the session; it names a folder, and carries nothing about the person scanned."""
Counter = Annotated[int, Field(ge=0, le=2**53)]
Repetition = Annotated[int, Field(ge=0, le=65535)]
Sentence = Annotated[str, Field(max_length=1000)]
ControllerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")]
CommandId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
ImageRole = Literal["image", "t1", "t2", "b0", "b1", "fss", "kssw", "mask"]
SessionState = Literal["opening", "ready", "failed", "closing", "closed"]
RefusalCode = Literal[
    "malformed", "version", "unknown-kind", "too-large", "unknown-session", "conflict", "closed", "busy", "limit", "disk",
    "not-ready", "not-allowed", "failed",
]  # fmt: skip


class WireMessage(Message):
    """Base of what travels between a client and the service."""

    protocol: Literal[1] = PROTOCOL_VERSION
    request_id: Counter = 0
    """Chosen by the client; the answer repeats it. 0 in what the service says unasked."""


class SessionMessage(WireMessage):
    session_id: SessionId


# client -> service


class Open(SessionMessage):
    """Begin a session. Sent again with the same content it is answered the same."""

    kind: Literal["open"] = "open"
    scan: dict[str, Any]
    """The `Scan`, as `model_dump(mode="json")` gives it: the journal needs no other file to be understood."""
    n_slices: Annotated[int, Field(ge=1, le=1024)] = 1
    """Images that make up one repetition (2-D multi-slice); 1: every image is a whole volume."""
    n_auxiliary: Annotated[int, Field(ge=0, le=8192)] = 0
    """Auxiliary and mask images that will come before image 0; compilation waits for them."""
    region_names: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=255)] = ()
    """Names of the labels 1, 2, .. of the mask, if one is sent."""
    use_encoder: bool = True


class Image(SessionMessage):
    """One MRD image; the body is `ismrmrd.Image.to_bytes()` as it came. Identity: (role, series, slice, repetition, set)."""

    kind: Literal["image"] = "image"
    role: ImageRole = "image"
    series: Annotated[int, Field(ge=0, le=65535)] = 0
    slice: Annotated[int, Field(ge=0, le=65535)] = 0
    repetition: Repetition = 0
    set: Annotated[int, Field(ge=0, le=65535)] = 0
    crc32: Annotated[int, Field(ge=0, le=2**32 - 1)]
    """Of the body."""


class Missing(SessionMessage):
    """The sender declares repetitions lost: they were played, no image of them will come."""

    kind: Literal["missing"] = "missing"
    repetitions: Annotated[tuple[Repetition, ...], Field(min_length=1, max_length=4096)]


class PlayedPulse(Pulse):
    """A saturation block as the scanner really played it."""

    b1_ut: Annotated[float, Field(ge=0, le=1000)]
    offset_ppm: Annotated[float, Field(ge=-1000, le=1000)]
    t_sat_s: Annotated[float, Field(ge=0, le=3600)]
    t_rec_s: Annotated[float, Field(ge=0, le=3600)]


class Played(SessionMessage):
    """Controller -> service: what was really played; this, not the plan, is what the posterior uses."""

    kind: Literal["played"] = "played"
    repetition: Repetition
    pulse: PlayedPulse
    next_pulse_in_ms: Annotated[float, Field(ge=0, le=3.6e6)] | None = None
    """From now to the first pulse of the next repetition; lets decisions say how much time is left."""


ControllerMode = Literal["advice", "acting"]
DecisionOutcome = Literal["obeyed", "advice", "refused", "expired"]
ControlName = Literal["pause", "resume", "stop", "abort", "exclude", "advice", "confirm"]
CommandName = Literal["pause", "resume", "stop", "abort"]
"""Those that go on to the controllers."""


class Subscribe(SessionMessage):
    """A controller takes part; repeated as its heartbeat. The service answers with every decision after `last_decision`."""

    kind: Literal["subscribe"] = "subscribe"
    mode: ControllerMode = "advice"
    reports_played: bool = False
    """Images then wait for the report of what was played; always so when acting."""
    last_decision: Annotated[int, Field(ge=-1, le=2**53)] = -1
    controller_id: ControllerId = ""
    """Chosen at random by the controller: connected anew, it takes its own place, and the acting role, back at once. Empty: its old
    connection has to be found silent first."""


class DecisionAck(SessionMessage):
    """What the controller did with a decision."""

    kind: Literal["decision_ack"] = "decision_ack"
    sequence_number: Counter
    outcome: DecisionOutcome
    reason: Sentence = ""


class Control(SessionMessage):
    """The operator's hand. `pause`, `resume`, `stop`, `abort` go on to the controllers; `exclude` takes an image out of the
    posterior; `advice` takes an acting controller's role away: from the next image on the approved schedule is assumed;
    `confirm` agrees to the stop that a decision proposes."""

    kind: Literal["control"] = "control"
    command_id: CommandId
    """A command sent twice is carried out once."""
    command: ControlName
    repetition: Repetition | None = None
    """Of the image to be excluded."""
    decision: Counter | None = None
    """Sequence number of the decision that is confirmed, refused if there is a later one; none: whichever is the latest on arrival."""

    @model_validator(mode="after")
    def _names_what_the_command_is_about(self) -> Control:
        if (self.command == "exclude") != (self.repetition is not None):
            raise ValueError("repetition is given with the command exclude, and only then")
        if self.command != "confirm" and self.decision is not None:
            raise ValueError("decision is given with the command confirm only")
        return self


class CommandAck(SessionMessage):
    """Controller -> service: a command was carried out, or why not."""

    kind: Literal["command_ack"] = "command_ack"
    command_id: CommandId
    outcome: Literal["done", "refused"]
    reason: Sentence = ""


class GetDecision(SessionMessage):
    """Ask for the last decision (a late joiner)."""

    kind: Literal["get_decision"] = "get_decision"


class GetMaps(SessionMessage):
    """Ask for the maps as they stand after everything absorbed so far."""

    kind: Literal["get_maps"] = "get_maps"


class GetStatus(WireMessage):
    kind: Literal["get_status"] = "get_status"


class GetMetrics(WireMessage):
    kind: Literal["get_metrics"] = "get_metrics"


class Ping(WireMessage):
    kind: Literal["ping"] = "ping"


class Close(SessionMessage):
    """End a session: what waits is absorbed first, then the summary comes back. Repetitions that are missing stay missing."""

    kind: Literal["close"] = "close"


# service -> client


class Opened(SessionMessage):
    kind: Literal["opened"] = "opened"
    state: SessionState


class Accepted(SessionMessage):
    """The image is on disk."""

    kind: Literal["accepted"] = "accepted"
    sequence_number: Counter
    """Of the record in the session's journal."""
    repetition: Repetition
    duplicate: bool = False


class Done(SessionMessage):
    """The request was carried out (and written down, if it changes anything)."""

    kind: Literal["done"] = "done"


class Refused(WireMessage):
    """The request was not carried out; nothing changed."""

    kind: Literal["refused"] = "refused"
    session_id: SessionId | None = None
    code: RefusalCode
    reason: Sentence


class SessionNotice(SessionMessage):
    """Said unasked: the session became ready, or failed."""

    kind: Literal["session"] = "session"
    state: SessionState
    reason: Sentence = ""
    ready_s: float | None = None


class Gap(SessionMessage):
    """Repetitions that are missing while later ones are here: send them again, or declare them `Missing`."""

    kind: Literal["gap"] = "gap"
    repetitions: tuple[Repetition, ...]


class Unusable(SessionMessage):
    """An accepted image was not used; the session goes on."""

    kind: Literal["unusable"] = "unusable"
    repetition: Repetition
    reason: Sentence


class DecisionMessage(SessionMessage):
    kind: Literal["decision"] = "decision"
    decision: Decision


class Command(SessionMessage):
    """Service -> controller: an operator's command; acknowledged, repeated until then, void after `expires_in_s`."""

    kind: Literal["command"] = "command"
    command_id: CommandId
    command: CommandName
    expires_in_s: Annotated[float, Field(gt=0)]


class CommandOutcome(SessionMessage):
    """Service -> operator: what became of a command."""

    kind: Literal["command_outcome"] = "command_outcome"
    command_id: CommandId
    outcome: Literal["done", "refused", "expired"]
    reason: Sentence = ""


class ArraySpec(Message):
    """One array; its values travel as a body, C order, little-endian."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
    dtype: Literal["float32"] = "float32"
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=2**31)], ...], Field(min_length=1, max_length=4)]
    """Slices of 65535 voxels each, as MRD allows them, make more than that of a volume."""

    @property
    def n_bytes(self) -> int:
        return 4 * math.prod(self.shape)


class Maps(SessionMessage):
    """Parameter maps, shape (z, y, x), NaN outside the region; one body each."""

    kind: Literal["maps"] = "maps"
    n_images: Counter
    arrays: Annotated[tuple[ArraySpec, ...], Field(max_length=64)]


class SessionStatus(Message):
    session_id: SessionId
    state: SessionState
    n_accepted: Counter
    n_decisions: Counter
    waiting: Counter
    """Repetitions accepted and not yet handed to the posterior."""
    n_jobs: Counter = 0
    """What the posterior has still to do: compile, absorb, make maps."""
    gaps: tuple[Repetition, ...] = ()
    paused: bool = False
    controllers: int = 0
    warnings: tuple[Sentence, ...] = ()


class Status(WireMessage):
    """Health and readiness. `ready`: every session that is open is compiled."""

    kind: Literal["status"] = "status"
    service_id: str
    """Changes when the service is restarted."""
    version: str
    ready: bool
    sessions: tuple[SessionStatus, ...]


class MetricsText(WireMessage):
    """Prometheus text exposition."""

    kind: Literal["metrics"] = "metrics"
    text: str


class Pong(WireMessage):
    kind: Literal["pong"] = "pong"
    service_id: str
    publish_endpoint: str


class Closed(SessionMessage):
    kind: Literal["closed"] = "closed"
    summary: dict[str, Any]


REQUESTS: tuple[type[WireMessage], ...] = (
    Open, Image, Missing, Played, Subscribe, DecisionAck, Control, CommandAck, GetDecision, GetMaps, GetStatus, GetMetrics, Ping,
    Close,
)  # fmt: skip
"""What the service accepts."""
REPLIES: tuple[type[WireMessage], ...] = (
    Opened, Accepted, Done, Refused, SessionNotice, Gap, Unusable, DecisionMessage, Command, CommandOutcome, Maps, Status,
    MetricsText, Pong, Closed,
)  # fmt: skip
"""What the service says."""
