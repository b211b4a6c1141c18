"""Frames and messages: exact inverses, and a named refusal for every way of being malformed."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from scansteer.realtime import codec, messages
from scansteer.realtime.codec import AnswerEncoder, ProtocolError, decode, decode_arrays, encode, encode_arrays
from scansteer.realtime.messages import ArraySpec, Image, Maps, Open, Ping

PULSE = messages.PlayedPulse(b1_ut=2.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=0.5)
DECISION = messages.Decision(
    session_id="s", sequence_number=0, repetition=0, n_images=1, n_planned=30, action="continue", reason="too few images",
    would_stop_at=None,
    regions=(
        messages.RegionReport(
            name="all", n_voxels=10, parameters={"fs": messages.ParameterReport(
                median=0.1, ci_lower=0.05, ci_upper=None, ci_halfwidth_relative=0.5, fraction_prior_limited=0.0)},
            cr_area_median=1.0, cr_area_p90=None, cr_shrinkage=None, anytime_area_median=2.0, fraction_converged=0.5,
        ),
    ),
    next_pulse=messages.SuggestedPulse(b1_ut=2, offset_ppm=3, t_sat_s=1, t_rec_s=1, expected_gain=0.1),
    lack_of_fit=messages.LackOfFit(statistic=1.0, passed=True), posterior_source="reference",
    audit=messages.Audit(n_voxels=5, m1_median=1.2, m2_median=1.2, fraction_over_4=0.0), valid_until_repetition=1,
    latency_ms=messages.Latency(receive=1, update=2, decide=3, total=6), margin_ms=None, warnings=("a warning",),
)  # fmt: skip
EXAMPLES: dict[str, tuple[messages.WireMessage, list[bytes]]] = {
    message.kind: (message, bodies)  # type: ignore[attr-defined]
    for message, bodies in [
        (Open(session_id="s", scan={"name": "x"}, region_names=("a",)), []),
        (Image(session_id="s", crc32=5, repetition=3), [b"body"]),
        (messages.Missing(session_id="s", repetitions=(1, 2)), []),
        (messages.Played(session_id="s", repetition=1, pulse=PULSE, next_pulse_in_ms=12.5), []),
        (messages.Subscribe(session_id="s", mode="acting", last_decision=4), []),
        (messages.DecisionAck(session_id="s", sequence_number=1, outcome="obeyed"), []),
        (messages.Control(session_id="s", command_id="c", command="exclude", repetition=3), []),
        (messages.CommandAck(session_id="s", command_id="c", outcome="refused", reason="no"), []),
        (messages.GetDecision(session_id="s"), []),
        (messages.GetMaps(session_id="s"), []),
        (messages.GetStatus(), []),
        (messages.GetMetrics(), []),
        (Ping(request_id=9), []),
        (messages.Close(session_id="s"), []),
        (messages.Opened(session_id="s", state="ready"), []),
        (messages.Accepted(session_id="s", sequence_number=3, repetition=2, duplicate=True), []),
        (messages.Done(session_id="s"), []),
        (messages.Refused(session_id=None, code="disk", reason="full"), []),
        (messages.SessionNotice(session_id="s", state="failed", reason="why"), []),
        (messages.Gap(session_id="s", repetitions=(1,)), []),
        (messages.Unusable(session_id="s", repetition=1, reason="NaN"), []),
        (messages.DecisionMessage(session_id="s", decision=DECISION), []),
        (messages.Command(session_id="s", command_id="c", command="stop", expires_in_s=3.0), []),
        (messages.CommandOutcome(session_id="s", command_id="c", outcome="expired"), []),
        (Maps(session_id="s", n_images=2, arrays=(ArraySpec(name="fs_map", shape=(1, 2)),)), [b"12345678"]),
        (
            messages.Status(service_id="x", version="1", ready=True, sessions=(
                messages.SessionStatus(session_id="s", state="ready", n_accepted=1, n_decisions=1, waiting=0),)),
            [],
        ),
        (messages.MetricsText(text="a 1"), []),
        (messages.Pong(service_id="x", publish_endpoint="tcp://127.0.0.1:1"), []),
        (messages.Closed(session_id="s", summary={"n_images": 3}), []),
    ]
}  # fmt: skip


def envelope(**changes: object) -> bytes:
    packed: bytes = msgpack.packb({**Ping().model_dump(), **changes})  # type: ignore[assignment]
    return packed


def maps_envelope(shape: list[int]) -> bytes:
    return envelope(kind="maps", session_id="s", n_images=1, arrays=[{"name": "a", "shape": shape}])


def test_there_is_an_example_of_every_kind():
    assert set(EXAMPLES) == {model.model_fields["kind"].default for model in (*messages.REQUESTS, *messages.REPLIES)}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_message_survives_the_round_trip(kind):
    message, bodies = EXAMPLES[kind]
    decoded, decoded_bodies = decode(encode(message, bodies))
    assert decoded == message
    assert list(decoded_bodies) == bodies


def test_a_decision_survives_json_too():
    assert messages.Decision.model_validate_json(DECISION.model_dump_json()) == DECISION


@pytest.mark.parametrize(
    ("frames", "code", "match"),
    [
        ([], "malformed", "1 to 65 frames, got 0"),
        ([b"x"] * 66, "malformed", "got 66"),
        ([b"x" * (codec.MAX_ENVELOPE_BYTES + 1)], "too-large", "envelope has 1048577 bytes"),
        ([b"\xc1"], "malformed", "not msgpack"),
        ([b"\x91\x01"], "malformed", "not a mapping"),
        ([b"\x81\x01\x02"], "malformed", "not a mapping|not msgpack"),
        ([b"\x91" * 3000], "malformed", "not msgpack"),
        ([envelope(protocol=2)], "version", "version 2 is not spoken"),
        ([envelope(kind="dance")], "unknown-kind", "kind 'dance'"),
        ([envelope(kind=["ping"])], "unknown-kind", "no message of kind"),
        ([envelope(extra=1)], "malformed", "unknown field 'extra'; remove it or compare with realtime/messages.py"),
        ([envelope(kind="close")], "malformed", "'session_id' is missing"),
        ([envelope(kind="close", session_id="../../etc")], "malformed", "session_id"),
        ([envelope(kind="close", session_id="a" * 65)], "malformed", "session_id"),
        ([envelope(kind="image", session_id="s", crc32=1)], "malformed", "has 1 bodies, got 0"),
        ([envelope(), b"body"], "malformed", "has 0 bodies, got 1"),
        ([envelope(kind="played", session_id="s", repetition=1,
                   pulse={"b1_ut": float("nan"), "offset_ppm": 1, "t_sat_s": 1, "t_rec_s": 1})], "malformed", "b1_ut"),
        ([envelope(kind="control", session_id="s", command_id="c", command="exclude")], "malformed", "exclude"),
        ([maps_envelope([2]), b"1234567"], "malformed", "has 7 bytes"),
        ([maps_envelope([65535] * 4), b""], "malformed", "asks for"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_by_name(frames, code, match):
    with pytest.raises(ProtocolError, match=match) as caught:
        decode(frames)
    assert caught.value.code == code


@pytest.mark.parametrize("field", ["protocol", "kind", "request_id"])
def test_what_is_nested_too_deeply_to_be_described_is_refused(field):
    content = {**Ping().model_dump(), field: None}
    nested = msgpack.packb(content).replace(b"\xc0", b"\x91" * 1010 + b"\x00")  # type: ignore[union-attr]
    with pytest.raises(ProtocolError, match="nested too deeply"):
        decode([nested])


def test_a_list_of_a_million_mistakes_is_refused_before_any_is_looked_at():
    with pytest.raises(ProtocolError, match="list of more than 4096 items"):
        decode([envelope(kind="missing", session_id="s", repetitions=[None] * 1_000_000)])


def test_a_service_does_not_look_into_messages_that_only_services_send():
    with pytest.raises(ProtocolError, match="does not take messages of kind 'status'") as caught:
        decode([envelope(kind="status", request_id=3, sessions=[{}] * 4000)], requests_only=True)
    assert (caught.value.code, caught.value.request_id) == ("unknown-kind", 3)


def test_a_body_beyond_the_limit_is_refused_before_anything_is_read():
    with pytest.raises(ProtocolError, match="body has 11 bytes, more than the 10"):
        decode([b"not even msgpack", b"x" * 11], max_body_bytes=10)


def test_a_refusal_names_the_request_when_it_can_be_read():
    with pytest.raises(ProtocolError) as caught:
        decode([envelope(kind="dance", request_id=77)])
    assert caught.value.request_id == 77


@pytest.mark.parametrize("duplicate", [True, False])
def test_a_short_cut_to_an_answer_gives_the_same_message(duplicate):
    values = {"request_id": 7, "session_id": "s", "sequence_number": 3, "repetition": 2, "duplicate": duplicate}
    assert decode(AnswerEncoder(messages.Accepted)(**values))[0] == messages.Accepted(**values)


def test_arrays_survive_the_round_trip():
    arrays = {"fs_map": np.array([[[0.1, np.nan], [0.3, 0.4]]], np.float32), "nrmse": np.ones((1, 2, 2), np.float64)}
    specs, bodies = encode_arrays(arrays)
    decoded = decode_arrays(specs, bodies)
    for name, array in arrays.items():
        np.testing.assert_array_equal(decoded[name], array.astype(np.float32))
