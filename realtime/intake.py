"""Images on their way into the journals: those that arrive together are written together, and answered when that is durable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from scansteer.realtime.codec import Bytes, ProtocolError, encode_answer
from scansteer.realtime.hosted import Arrival, HostedSession
from scansteer.realtime.journal import JournalError
from scansteer.realtime.messages import Accepted, Image
from scansteer.realtime.metrics import Metrics
from scansteer.realtime.outbox import Outbox, Outgoing, to
from scansteer.realtime.request import Request

log = logging.getLogger("scansteer.broker")

Refuse = Callable[[bytes, int, str | None, ProtocolError], Outgoing]
"""Identity, request, session, why."""


class Intake:
    """Collects new images of one session; `write` must come before anything else is done with that session."""

    def __init__(self, outbox: Outbox, metrics: Metrics, refuse: Refuse) -> None:
        self._outbox = outbox
        self._metrics = metrics
        self._refuse = refuse
        self._session: HostedSession | None = None
        self._arrivals: list[tuple[Arrival, Request]] = []

    def take(self, session: HostedSession, message: Image, body: Bytes, request: Request) -> None:
        """Check an image; it is written down with the next `write`.

        Raises
        ------
        ProtocolError
            It cannot belong to the session.
        """
        arrival = Arrival(message, request.frames, time.perf_counter())
        if not self._goes_along(session, message):
            self.write()
        session.attendance.source = request.identity
        known = session.received.find(message)
        if known is not None:
            self._metrics.duplicates += 1
            accepted = known.model_copy(update={"request_id": message.request_id})
            self._outbox.hold(message.session_id, to(request.identity, accepted))  # its first copy may not be durable yet
            return
        session.check_image(message, body)
        self._session = session
        self._arrivals.append((arrival, request))

    def write(self) -> None:
        """Write down what was taken, and let it take effect; the answers are held until it is durable."""
        session, arrivals = self._session, self._arrivals
        if session is None:
            return
        self._session, self._arrivals = None, []
        try:
            entries = session.add_images([arrival for arrival, _ in arrivals])
        except Exception as error:  # whatever it is, it must not end the service for all
            self._not_written(arrivals, refusal_of(error))
            return
        for (arrival, request), entry in zip(arrivals, entries, strict=True):
            self._accept(arrival.message, request, entry.sequence)
        self._metrics.images += len(arrivals)

    def _goes_along(self, session: HostedSession, message: Image) -> bool:
        """Whether an image can be judged without knowing what those before it change: not the first one, none sent twice."""
        if session is not self._session:
            return False
        latest = self._arrivals[-1][0].message
        alike = message.role == latest.role and message.series == latest.series and message.set == latest.set
        return alike and (message.repetition, message.slice) > (latest.repetition, latest.slice)

    def _accept(self, message: Image, request: Request, sequence_number: int) -> None:
        accepted = encode_answer(
            Accepted,
            request_id=message.request_id,
            session_id=message.session_id,
            sequence_number=sequence_number,
            repetition=message.repetition,
        )
        self._outbox.hold(message.session_id, Outgoing(request.identity, accepted))

    def _not_written(self, arrivals: list[tuple[Arrival, Request]], error: ProtocolError) -> None:
        for arrival, request in arrivals:
            message = arrival.message
            self._outbox.hold(message.session_id, self._refuse(request.identity, message.request_id, message.session_id, error))


def refusal_of(error: Exception) -> ProtocolError:
    """What a client is told when its message could not be carried out; what it need not know goes into the log."""
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, JournalError):
        log.error("%s", error)
        return ProtocolError("disk", "The disk does not take it; what was accepted before is safe.")
    log.error("a message could not be answered", exc_info=error)
    return ProtocolError("failed", "Internal error; the service's log has the details.")
