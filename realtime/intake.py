"""Images on their way into the journals: those that arrive together are written together, and answered when that is durable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from scansteer.realtime.codec import AnswerEncoder, Bytes, ProtocolError
from scansteer.realtime.hosted import Arrival, HostedSession
from scansteer.realtime.journal import Entry, JournalError
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
        self._arrivals: list[Arrival] = []
        self._encode_accepted = AnswerEncoder(Accepted)

    def take(self, session: HostedSession, message: Image, body: Bytes, request: Request) -> None:
        """Check an image; it is written down with the next `write`.

        Raises
        ------
        ProtocolError
            It cannot belong to the session.
        """
        received_at = time.perf_counter()
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
        self._arrivals.append(Arrival(message, request, received_at))

    def write(self) -> None:
        """Write down what was taken, and let it take effect; the answers are held until it is durable."""
        session, arrivals = self._session, self._arrivals
        if session is None:
            return
        self._session, self._arrivals = None, []
        try:
            entries = session.add_images(arrivals)
        except Exception as error:  # whatever it is, it must not end the service for all
            self._not_written(arrivals, refusal_of(error))
            return
        answers = [self._accepted(arrival, entry) for arrival, entry in zip(arrivals, entries, strict=True)]
        self._outbox.hold(session.opening.session_id, *answers)
        self._metrics.images += len(arrivals)

    def _goes_along(self, session: HostedSession, message: Image) -> bool:
        """Whether an image can be judged without knowing what those before it change: not the first one, none sent twice."""
        if session is not self._session:
            return False
        latest = self._arrivals[-1].message
        alike = message.role == latest.role and message.series == latest.series and message.set == latest.set
        return alike and (message.repetition, message.slice) > (latest.repetition, latest.slice)

    def _accepted(self, arrival: Arrival, entry: Entry) -> Outgoing:
        message, request, _ = arrival
        accepted = self._encode_accepted(
            request_id=message.request_id,
            session_id=message.session_id,
            sequence_number=entry.sequence,
            repetition=message.repetition,
        )
        return Outgoing(request.identity, accepted)

    def _not_written(self, arrivals: list[Arrival], error: ProtocolError) -> None:
        for message, request, _ in arrivals:
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
