"""Images that contradict themselves, their message or their session are refused by name; maps and masks."""

from __future__ import annotations

import zlib

import ismrmrd
import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.realtime import images
from scansteer.realtime.client import image_of
from scansteer.realtime.image_check import IMAGE_FACTS
from scansteer.realtime.images import image_message
from scansteer.realtime.messages import Image, Subscribe


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"crc32": 1}, "checksum"),
        ({"repetition": 5}, "in the image's header, not in its message"),
        ({"series": 9}, "in the image's header"),
        ({"role": "t1"}, "Meta says"),
    ],
)
def test_an_envelope_that_contradicts_its_image_is_refused(stage, opening, make_image, change, match):
    stage.say(opening)
    body = make_image(0)
    (answer,) = stage.say(image_of("s", body).model_copy(update=change), [body])
    assert answer.code == "malformed"
    assert match in answer.reason


@pytest.mark.parametrize(
    ("make_body", "code"),
    [
        (lambda body: body[:100], "malformed"),
        (lambda body: body[:-1], "malformed"),
        (lambda body: body + b"\0", "malformed"),
        (lambda body: body[:2] + b"\x63\x00" + body[4:], "malformed"),
        (lambda body: body[:16] + b"\xff\xff\xff\xff" + body[20:], "too-large"),
        (lambda body: body[:198] + b"\xff" * 8 + body[206:], "too-large"),
        (lambda body: body[:198] + (2**20 + 1).to_bytes(8, "little") + bytes(2**20 + 1) + body[206:], "too-large"),
        (lambda body: body[:16] + bytes(6) + body[22:], "too-large"),
    ],
)
def test_a_body_that_contradicts_its_header_is_refused(stage, opening, make_image, make_body, code, kinds):
    stage.say(opening)
    body = make_image(0)
    changed = make_body(body)
    envelope = image_of("s", body).model_copy(update={"crc32": zlib.crc32(changed)})
    (answer,) = stage.say(envelope, [changed])
    assert (answer.kind, answer.code) == ("refused", code)
    assert kinds(stage.image("s", body)) == ["accepted"]


def test_images_of_another_series_or_slice_are_refused_by_name(stage, opening, make_image):
    stage.say(opening)
    stage.image("s", make_image(0))
    assert "not this session's" in stage.image("s", make_image(1, series_index=2))[0].reason
    assert "opened with 1 slices" in stage.image("s", make_image(1, slice=1))[0].reason
    assert "beyond the 4096" in stage.image("s", make_image(5000))[0].reason


def test_auxiliary_images_wait_for_each_other_and_compile_once(serve_config, fake_session, opening, make_image, make_stage):
    made = []

    class Recording(fake_session):
        def __init__(self, setup):
            made.append(set(setup.auxiliaries))
            super().__init__(setup)

    stage = make_stage(serve_config, Recording)
    stage.say(opening.model_copy(update={"n_auxiliary": 2}))
    for role, name in (("t1", "T1"), ("t2", "T2")):
        assert stage.jobs == []
        body = make_image(0, meta={"DataRole": name})
        stage.say(image_of("s", body, role=role), [body])
    stage.work()
    assert made == [{"t1", "t2"}]
    stage.image("s", make_image(0))
    body = make_image(0, meta={"DataRole": "B1MAP"})
    (answer,) = stage.say(image_of("s", body, role="b1"), [body])
    assert "after image 0" in answer.reason
    stage.broker.close()


def test_a_map_is_judged_without_decoding_its_pixels(stage, opening, make_image, monkeypatch, kinds):
    stage.say(opening)
    monkeypatch.setattr(images, "_widened", lambda stored: pytest.fail("pixels were decoded on the event loop"))
    good = make_image(0, meta={"DataRole": "T1"})
    bad = make_image(0, meta={"DataRole": "T1", "RescaleSlope": "-1"}, slice=1)
    assert kinds(stage.say(image_of("s", good, role="t1"), [good])) == ["accepted"]
    (answer,) = stage.say(image_of("s", bad, role="t1"), [bad])
    assert (answer.code, answer.reason) == ("malformed", "RescaleSlope of the image must be positive, got -1.")


def test_a_new_mask_during_the_scan_changes_the_region(stage, opening, make_image):
    stage.say(opening)
    stage.say(Subscribe(session_id="s"), identity=b"controller")
    for repetition in range(2):
        stage.image("s", make_image(repetition))
    before = [message.decision for message in stage.work() if message.kind == "decision"]
    body = make_image(0, meta={"DataRole": "MASK"})
    stage.say(image_of("s", body, role="mask"), [body])
    other = image_message(np.full((1, 5, 4), 2, np.float32), meta={"DataRole": "MASK"})
    (refused,) = stage.say(image_of("s", other, role="mask"), [other])
    assert "Another mask image of repetition 0" in refused.reason
    assert "a further mask needs another series or repetition" in refused.reason
    (after,) = [message.decision for message in stage.work() if message.kind == "decision"]
    assert (after.sequence_number, after.n_images) == (2, 2)
    assert after.reason != before[-1].reason
    assert "region was changed" in after.warnings[-1]


def test_a_mask_on_which_no_image_can_be_used_changes_nothing(serve_config, fake_session, make_stage, opening, make_image):
    class Particular(fake_session):
        def absorb(self, frame, **others):
            if self.setup.region is not None and not self.setup.region.pixels.any():
                raise InputError("The label image marks no voxel.")
            return super().absorb(frame, **others)

    stage = make_stage(serve_config, Particular)
    stage.say(opening)
    for repetition in range(2):
        stage.image("s", make_image(repetition))
    stage.work()
    assert stage.broker.status().sessions[0].n_decisions == 2
    body = image_message(np.zeros((1, 5, 4), np.float32), meta={"DataRole": "MASK"})
    stage.say(image_of("s", body, role="mask"), [body])
    stage.work()
    assert "no effect" in (said := stage.broker.status().sessions[0].warnings[-1])
    assert "marks no voxel" in said
    assert stage.broker.status().sessions[0].n_decisions == 2
    stage.image("s", make_image(2))
    stage.work()
    assert stage.broker.status().sessions[0].n_decisions == 3
    stage.broker.close()


def test_before_any_image_was_used_every_mask_is_taken(serve_config, fake_session, make_stage, opening, make_image):
    """The first mask allows no image and the second one does: neither is refused for it."""

    class Particular(fake_session):
        def absorb(self, frame, **others):
            if self.setup.region is None or not self.setup.region.pixels.any():
                raise InputError("The label image marks no voxel.")
            return super().absorb(frame, **others)

    stage = make_stage(serve_config, Particular)
    stage.say(opening)
    for repetition in range(2):
        stage.image("s", make_image(repetition))
    stage.work()
    assert stage.broker.status().sessions[0].n_decisions == 0
    for number, pixel in enumerate((0, 1)):
        body = image_message(np.full((1, 5, 4), pixel, np.float32), repetition=number, meta={"DataRole": "MASK"})
        (answer,) = stage.say(image_of("s", body, role="mask"), [body])
        assert answer.kind == "accepted"
        stage.work()
        assert "no effect" not in stage.broker.status().sessions[0].warnings[-1]
    assert stage.broker.status().sessions[0].n_decisions == 1
    stage.broker.close()


def test_an_image_is_not_mistaken_for_one_in_another_role(stage, opening, make_image, kinds):
    stage.say(opening)
    body = make_image(0)
    assert kinds(stage.say(Image(session_id="s", crc32=zlib.crc32(body)), [body])) == ["accepted"]
    mask = make_image(0, meta={"DataRole": "MASK"})
    assert kinds(stage.say(image_of("s", mask, role="mask"), [mask])) == ["accepted"]


def test_the_layout_of_an_image_is_that_of_its_library():
    header = ismrmrd.ImageHeader(
        data_type=1, matrix_size=(2, 3, 4), channels=5, slice=6, repetition=7, set=8, image_series_index=9, image_index=99
    )
    assert IMAGE_FACTS.unpack_from(bytes(header) + (10).to_bytes(8, "little")) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def test_maps_that_come_one_after_the_other_are_compiled_for_once(serve_config, fake_session, make_stage, opening, make_image):
    made = []

    class Counted(fake_session):
        def __init__(self, setup):
            super().__init__(setup)
            made.append(len(setup.auxiliaries["t1"].pixels) if setup.auxiliaries else 0)

    def send_map(slice_: int) -> None:
        body = make_image(0, slice=slice_, meta={"DataRole": "T1"})
        stage.say(image_of("s", body, role="t1"), [body])

    stage = make_stage(serve_config, Counted)
    stage.say(opening.model_copy(update={"n_slices": 5}))
    for slice_ in range(4):
        send_map(slice_)
    assert not stage.broker.is_ready
    stage.work()
    assert (made, stage.broker.is_ready) == ([4], True)
    send_map(4)
    assert not stage.broker.is_ready
    stage.work()
    assert (made, stage.broker.is_ready) == ([4, 5], True)
    stage.broker.close()


def test_a_map_makes_a_session_ready_that_could_not_be_compiled_without_it(
    serve_config, fake_session, make_stage, opening, make_image
):
    class Needy(fake_session):
        def __init__(self, setup):
            super().__init__(setup)
            if not setup.auxiliaries:
                raise InputError("The scan needs a T1 map.")

    stage = make_stage(serve_config, Needy)
    stage.say(opening)
    stage.work()
    assert stage.broker.status().sessions[0].state == "failed"
    body = make_image(0, meta={"DataRole": "T1"})
    stage.say(image_of("s", body, role="t1"), [body])
    stage.work()
    assert stage.broker.status().sessions[0].state == "ready"
    stage.image("s", make_image(0))
    stage.work()
    assert stage.broker.status().sessions[0].n_decisions == 1
    stage.broker.close()
