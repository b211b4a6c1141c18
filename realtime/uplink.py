"""From one reconstruction's connection to the service: a thread that delivers its images, however long the service is away.

The connection hands images over and goes on at once. What the service has not taken yet is kept, in order, and sent when it is
there again; the images themselves have long been passed back to the reconstruction.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from scansteer.core.errors import InputError, ScansteerError
from scansteer.realtime.admission import Admitted, Choice
from scansteer.realtime.client import Client
from scansteer.realtime.connection import RefusedError, ServiceSilentError
from scansteer.realtime.messages import Decision, Gap, SessionNotice, Unusable

log = logging.getLogger("scansteer.gateway")


Given = TypeVar("Given")

_POLL_S = 0.1


@dataclass(frozen=True)
class MapSet:
    """Maps as they stood after some images, and the decision of that moment."""

    arrays: dict[str, np.ndarray]
    decision: Decision


class Uplink:
    """One session on the service, fed by one connection."""

    def __init__(
        self, choice: Choice, make_client: Callable[[], Client], say: Callable[[str], None], send_maps: Callable[[MapSet], None]
    ) -> None:
        """
        Parameters
        ----------
        make_client
            Connects to the service.
        say
            Told, in a sentence, what the peer may want to know. Called from the uplink's thread.
        send_maps
            Given the maps every so many images, and at the end. Called from the uplink's thread.
        """
        self.session_id = uuid.uuid4().hex
        self.done = threading.Event()
        """Everything was delivered, or given up."""
        self.is_away = True
        """The service did not answer lately, or its disk is full."""
        self._n_put_bytes = self._n_taken_bytes = 0
        self._choice = choice
        self._make_client = make_client
        self._say = say
        self._send_maps = send_maps
        self._queue: queue.SimpleQueue[Admitted | None] = queue.SimpleQueue()
        self._abandoned = threading.Event()
        self._give_up_at = float("inf")
        self._repetitions: set[int] = set()
        self._next_repetition = 0
        self._slices: dict[int, set[int]] = {}
        self._client: Client | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="scansteer-uplink")
        self._thread.start()

    @property
    def n_kept_bytes(self) -> int:
        """Of images that the service has not taken yet."""
        return self._n_put_bytes - self._n_taken_bytes  # each is counted by one thread

    @property
    def heard_at(self) -> float:
        """When the service last said anything, `time.monotonic()`."""
        return -float("inf") if self._client is None else self._client.heard_at

    def put(self, image: Admitted) -> None:
        """Hand an image over; once the session has ended (the service refused it), nothing is kept."""
        if self.done.is_set():
            return
        self._n_put_bytes += len(image.body)
        self._queue.put(image)

    def finish(self) -> None:
        """No more images will come: deliver what is left, ask for the maps, close the session."""
        self._queue.put(None)

    def give_up_in(self, seconds: float) -> None:
        """From now on the service is waited for no longer than this."""
        self._give_up_at = time.monotonic() + seconds

    def abandon(self) -> None:
        """Stop as soon as possible; what was not delivered is lost here (the service asks for it if it can be sent again)."""
        self._abandoned.set()
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            with self._make_client() as client:
                self._client = client
                self._deliver(client)
        except (ScansteerError, InputError) as error:
            log.error("session %s: %s", self.session_id, error)
            self._say(str(error))
        finally:
            self.done.set()

    def _deliver(self, client: Client) -> None:
        self._open(client)
        n_used = 0
        while (image := self._queue.get()) is not None and not self._abandoned.is_set():
            self._send(client, image)
            self._n_taken_bytes += len(image.body)
            if image.role == "image" and self._is_complete(image):
                n_used += 1
                every = self._choice.config.maps_every
                if self._choice.config.send_maps and every is not None and n_used % every == 0:
                    self._fetch_maps(client)
            self._take_notices(client)
        if not self._abandoned.is_set():
            self._finish(client)

    def _open(self, client: Client) -> None:
        choice = self._choice
        self._persist(
            lambda: client.open(choice.scan, self.session_id, n_slices=choice.n_slices, n_auxiliary=choice.config.n_auxiliary)
        )

    def _send(self, client: Client, image: Admitted) -> None:
        try:
            self._persist(lambda: client.send_image(self.session_id, image.body, role=image.role))
        except RefusedError as error:
            log.warning("session %s: image of repetition %d not taken: %s", self.session_id, image.repetition, error)
            self._say(f"The image of repetition {image.repetition} was not taken: {error}")
            if image.role == "image" and error.code != "conflict":  # then another one of that repetition is there
                self._declare(client, [image.repetition])
        if image.role == "image":
            self._declare_missing(client, image)

    def _declare_missing(self, client: Client, image: Admitted) -> None:
        """TCP loses nothing: a repetition that many later ones have overtaken does not come any more."""
        self._repetitions.add(image.repetition)
        window = self._choice.config.reorder_repetitions
        missing = [r for r in range(self._next_repetition, max(self._repetitions) - window) if r not in self._repetitions]
        while self._next_repetition in self._repetitions or self._next_repetition in missing:
            self._next_repetition += 1
        if missing:
            self._say(f"Repetitions {missing} did not come; they count as missing.")
            self._declare(client, missing)

    def _declare(self, client: Client, missing: list[int]) -> None:
        """Tell the service not to wait for repetitions; without effect on those that it has."""
        try:
            self._persist(lambda: client.declare_missing(self.session_id, missing))
        except RefusedError as error:
            log.warning("session %s: repetitions %s not declared missing: %s", self.session_id, missing, error)

    def _answer_gap(self, client: Client, repetitions: tuple[int, ...]) -> None:
        """What was delivered is not here any more, and what was overtaken does not come: the service shall not wait for either."""
        overtaken = max(self._repetitions, default=0) - self._choice.config.reorder_repetitions
        lost = [r for r in repetitions if r < overtaken or len(self._slices.get(r, ())) == self._choice.n_slices]
        if lost:
            self._say(f"Repetitions {lost} did not come whole, or the service has lost them; they count as missing.")
            self._declare(client, lost)

    def _is_complete(self, image: Admitted) -> bool:
        slices = self._slices.setdefault(image.repetition, set())
        before = len(slices)
        slices.add(image.slice)
        return before < self._choice.n_slices == len(slices)

    def _fetch_maps(self, client: Client) -> None:
        if self._is_unheeded:
            return
        self._wait_for_posterior(client)

        def fetch() -> MapSet:
            arrays = client.maps(self.session_id, timeout_s=self._choice.config.finish_timeout_s)
            return MapSet(arrays, client.last_decision(self.session_id))

        maps = self._try(fetch)
        if maps is not None:
            self._send_maps(maps)

    @property
    def _is_unheeded(self) -> bool:
        """The connection has ended: nobody waits for maps."""
        return self._give_up_at < float("inf")

    def _wait_for_posterior(self, client: Client) -> None:
        """Return when the posterior has nothing left to do; a service that goes away meanwhile is noticed."""
        while not (self._abandoned.is_set() or self._is_unheeded):
            status = self._persist(lambda: client.session_status(self.session_id))
            if status is None or status.n_jobs == 0:
                return
            client.take_in(_POLL_S)

    def _finish(self, client: Client) -> None:
        if self._choice.config.send_maps and self._repetitions:
            missing = [r for r in range(max(self._repetitions)) if r not in self._repetitions and r >= self._next_repetition]
            if missing:
                self._declare(client, missing)
            self._take_notices(client)
            self._fetch_maps(client)
        self._take_notices(client)
        self._persist(lambda: client.close_session(self.session_id, timeout_s=self._choice.config.finish_timeout_s))

    def _take_notices(self, client: Client) -> None:
        while (message := client.receive(0)) is not None:
            match message:
                case Gap(repetitions=repetitions):
                    self._answer_gap(client, repetitions)
                case Unusable(reason=reason):
                    self._say(reason)
                case SessionNotice(state="failed", reason=reason):
                    self._say(f"The session failed: {reason}")
                case _:
                    pass

    def _persist(self, request: Callable[[], Given]) -> Given | None:
        """Repeat a request until the service has carried it out; none if the uplink is abandoned meanwhile.

        Raises
        ------
        RefusedError
            It answered no, for another reason than that its disk is full or that it has too much to do.
        ServiceSilentError
            The time to wait is over.
        """
        while not self._abandoned.is_set():
            try:
                answer = request()
            except (ServiceSilentError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.code not in ("disk", "busy"):
                    raise
                self._note_away(True)
                if time.monotonic() > self._give_up_at:
                    raise
                self._abandoned.wait(_POLL_S)
                continue
            self._note_away(False)
            return answer
        return None

    def _try(self, request: Callable[[], Given]) -> Given | None:
        """What a request gives; none, and a sentence to the peer, if it cannot be had."""
        try:
            return request()
        except ServiceSilentError:
            self._note_away(True)
        except ScansteerError as error:
            log.warning("session %s: %s", self.session_id, error)
            self._say(str(error))
        return None

    def _note_away(self, is_away: bool) -> None:
        if is_away and not self.is_away:
            log.warning("session %s: the service is away, or its disk is full; images are kept", self.session_id)
        elif self.is_away and not is_away:
            log.info("session %s: the service is there", self.session_id)
        self.is_away = is_away
