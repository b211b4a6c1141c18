"""kill -9 at random moments, opening and closing among them: accepted images are there, none twice, decisions equal an undisturbed run's.

The default run kills a service with a small stand-in for the posterior a handful of times. The long run (`-m long`) kills 180
times on a small scan and 20 times on the phantom, with the real posterior; `-k` takes some of its seeds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Auxiliary, Scan
from scansteer.realtime import journal
from scansteer.realtime.client import Client
from scansteer.realtime.codec import decode
from scansteer.realtime.connection import RefusedError
from scansteer.realtime.images import image_message
from scansteer.realtime.messages import Close, Image, Open, Opened

SEED = 20251122


class Victim:
    """A service process that can be killed and started again on the same folder and address."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.endpoint = f"ipc://{folder}/service"
        self._kind = kind
        self._config = folder / "serve.yaml"
        settings = {"endpoint": self.endpoint, "publish_endpoint": f"ipc://{folder}/publish"}
        self._config.write_text(yaml.safe_dump({**settings, "data_dir": str(folder / "sessions")}))
        self.start()

    def start(self) -> None:
        script = Path(__file__).with_name("small_service.py")
        with open(self.folder / "log", "a") as log:
            command = [sys.executable, str(script), str(self._config), self._kind]
            compiled = str(self.folder.parent / "compiled")
            self.process = subprocess.Popen(command, stderr=log, env={"JAX_COMPILATION_CACHE_DIR": compiled, **os.environ})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def pictures(scan: Scan, seed: int) -> list[bytes]:
    """Decaying noise in a disc: what it says is of no interest here, only that it says the same twice."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-8:8, -8:8]
    disc = 1000.0 * (np.hypot(x, y) < 4) + 2.0
    noisy = [disc * (1 - 0.01 * n) + generator.normal(0, 2, disc.shape) for n in range(len(scan.schedule))]
    return [image_message(image[None].astype(np.float32), repetition=n) for n, image in enumerate(noisy)]


def stream(victim: Victim, scan: Scan, images: list[bytes], moments: Sequence[int | str], generator: random.Random) -> None:
    """Send everything, killing the service on the way: at "opening", at images by their number, at "closing"."""
    with Client(victim.endpoint, timeout_s=120, resend_s=0.2) as client:
        opening = Open(session_id="s", scan=scan.model_dump(mode="json"))
        if "opening" in moments:
            client.post(opening)
            die(victim, generator)
        client.ask(opening, Opened)
        for number, image in enumerate(images):
            if number in moments:
                if generator.random() < 0.3:
                    client.wait_ready("s")  # else it dies while it compiles
                if generator.random() < 0.7:
                    client.post_image("s", image)  # on its way when the process dies, or accepted already
                die(victim, generator)
            client.send_image("s", image, timeout_s=120)
        if "closing" in moments:
            if generator.random() < 0.5:
                wait_for_decisions(client)  # else it dies while images wait for the posterior
            client.post(Close(session_id="s"))
            die(victim, generator)
        end(client, victim)


def die(victim: Victim, generator: random.Random) -> None:
    """At once, or while the disk is written, or while the posterior works."""
    time.sleep(generator.choice((0.004, 0.04, 0.4)) * generator.random())
    victim.kill()
    victim.start()


def wait_for_decisions(client: Client) -> None:
    while client.session_status("s").n_jobs:
        client.take_in(0.05)


def end(client: Client, victim: Victim) -> None:
    """Close the session; one that was closed before the kill is not known any more."""
    try:
        client.close_session("s", timeout_s=300)
    except RefusedError as error:
        assert error.code == "unknown-session"
        assert (victim.folder / "sessions" / "s" / "closed.json").exists()


def decisions(folder: Path) -> list[dict]:
    lines = (folder / "sessions" / "s" / "decisions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for decision in found:
        del decision["latency_ms"], decision["margin_ms"]
    return found


def images_on_disk(folder: Path) -> list[bytes]:
    records = [decode(frames) for _, frames in journal.read_all(folder / "sessions" / "s" / "journal")]
    return [bytes(bodies[0]) for message, bodies in records if isinstance(message, Image)]


def undisturbed(folder: Path, kind: str, scan: Scan) -> list[dict]:
    """The decisions of a run in which nothing happens."""
    folder.mkdir()
    victim = Victim(folder, kind)
    try:
        stream(victim, scan, pictures(scan, SEED), (), random.Random(SEED))
    finally:
        victim.kill()
    expected = decisions(folder)
    assert len(expected) == len(scan.schedule)
    return expected


def check(folder: Path, kind: str, scan: Scan, moments: int | Sequence[int | str], seed: int, expected: list[dict]) -> None:
    """`moments`: when the service is killed, or how often at random."""
    folder.mkdir()
    generator = random.Random(SEED + seed)
    if isinstance(moments, int):
        moments = generator.sample(["opening", *range(len(scan.schedule)), "closing"], moments)
    images = pictures(scan, SEED)
    victim = Victim(folder, kind)
    try:
        stream(victim, scan, images, moments, generator)
    finally:
        victim.kill()
    assert images_on_disk(folder) == images
    assert decisions(folder) == expected


def small_scan() -> Scan:
    """Eight images, everything measured: compiles in seconds."""
    fixed = {
        "t1_s": Auxiliary(lower=3.0, upper=3.0),
        "t2_s": Auxiliary(lower=1.0, upper=1.0),
    }
    changes = {"schedule": PUBLISHED.schedule[:8], "auxiliaries": fixed, "matrix": None, "name": "small"}
    return PUBLISHED.model_copy(update=changes)


WHOLE = PUBLISHED.model_copy(update={"matrix": None})


def test_a_killed_service_goes_on_as_if_nothing_had_happened(tmp_path):
    expected = undisturbed(tmp_path / "quiet", "fake", WHOLE)
    check(tmp_path / "killed", "fake", WHOLE, 3, 0, expected)


@pytest.mark.parametrize("moment", ["opening", "closing"])
def test_a_service_killed_while_it_opens_or_closes_goes_on(moment, tmp_path):
    scan = small_scan()
    expected = undisturbed(tmp_path / "quiet", "fake", scan)
    check(tmp_path / "killed", "fake", scan, [moment], 1, expected)


@pytest.fixture(scope="module")
def expected_of_small(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("small")
    return folder, undisturbed(folder / "quiet", "real", small_scan())


@pytest.fixture(scope="module")
def expected_of_phantom(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("phantom")
    return folder, undisturbed(folder / "quiet", "real", WHOLE)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_a_small_scan_survives_six_kills(expected_of_small, seed):
    folder, expected = expected_of_small
    check(folder / f"killed-{seed}", "real", small_scan(), 6, seed, expected)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_the_phantom_survives_five_kills(expected_of_phantom, seed):
    folder, expected = expected_of_phantom
    check(folder / f"killed-{seed}", "real", WHOLE, 5, seed, expected)
