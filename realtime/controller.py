"""The sequence controller's library: advice before every repetition, never late, and the approved schedule whenever in doubt.

A thread of its own keeps the connection: heartbeats, decisions, acknowledgements, reports of what was played. The sequence asks
`advise` before a repetition and tells `played` after it; both return in bounded time whatever the service does.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scansteer.core.errors import ScansteerError
from scansteer.protocols.scan import SaturationBlock
from scansteer.realtime.client import Client, request
from scansteer.realtime.config import DEFAULT_ENDPOINT, Keys
from scansteer.realtime.messages import (
    Command,
    CommandAck,
    CommandName,
    ControllerMode,
    Decision,
    DecisionAck,
    DecisionMessage,
    DecisionOutcome,
    Played,
    PlayedPulse,
    Pulse,
    Refused,
    SessionMessage,
    Subscribe,
    SuggestedPulse,
    WireMessage,
)

log = logging.getLogger("scansteer.controller")

Action = Literal["continue", "stop", "pause", "abort"]

_POLL_S = 0.01
_FIRST_REPEAT_S = 0.2


@dataclass(frozen=True)
class Advice:
    """What to do before a repetition."""

    action: Action
    """`stop`: end the scan in good order; `pause`: wait, then ask again; `abort`: end it at once."""
    pulse: Pulse | None
    """To be played in place of the scheduled block; none: the approved schedule."""
    reason: str
    decision: Decision | None = None
    """What the service said, for display: in advice-only mode it is shown and not obeyed."""
    is_fallback: bool = False
    """The service had nothing valid to say in time."""


@dataclass
class _Report:
    """A report of what was played, on its way."""

    message: Played
    number: int | None = None
    sent_at: float = 0.0


class Controller:
    """One controller in one session. `advise` and `played` may be called from any one thread.

    Everything that goes wrong (service silent, decision late, void or refused) gives the approved schedule. Operator's commands
    are obeyed in both modes: they come from a person.
    """

    def __init__(
        self,
        session_id: str,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        mode: ControllerMode = "advice",
        reports_played: bool = True,
        refuse: Callable[[SuggestedPulse], str | None] | None = None,
        on_command: Callable[[str], None] | None = None,
        keys: Keys | None = None,
        heartbeat_s: float = 1.0,
        silent_after_s: float = 3.0,
    ) -> None:
        """
        Parameters
        ----------
        mode
            `advice` (the default): decisions are shown. `acting`: they are obeyed; one controller of a session can be that.
        reports_played
            Images then wait for `played`. Leave it on unless what is played is always the schedule.
        refuse
            Looks at a suggested pulse and returns why it cannot be played, or None.
        on_command
            Called from the library's thread as soon as the operator commands `pause`, `resume`, `stop` or `abort`.
        """
        self.session_id = session_id
        self.mode: ControllerMode = mode
        self._reports_played = reports_played or mode == "acting"
        self._refuse = refuse
        self._on_command = on_command
        self._heartbeat_s = heartbeat_s
        self._silent_after_s = silent_after_s
        self._changed = threading.Condition()
        self._stopping = False
        self._decision: Decision | None = None
        self._last_heard = -float("inf")
        self._refused: Refused | None = None
        self._in_force: Literal["pause", "stop", "abort"] | None = None
        self._commands: dict[str, tuple[CommandName, float]] = {}
        self._carried_out: set[str] = set()
        self._outbox: deque[SessionMessage] = deque()
        self._reports: deque[_Report] = deque()
        self._answered = -1
        self._controller_id = uuid.uuid4().hex
        self._subscription()  # raises now, and not in the thread
        self._client = Client(endpoint, keys=keys, timeout_s=0.5)
        self._thread = threading.Thread(target=self._run, daemon=True, name="scansteer-controller")
        self._thread.start()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether the service was heard of lately, and takes this controller."""
        return self._refused is None and time.monotonic() - self._last_heard < self._silent_after_s

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the service's first answer; false: none came, and the approved schedule it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_connected, timeout_s)

    def advise(self, repetition: int, deadline_s: float) -> Advice:
        """What to do before a repetition; returns within `deadline_s` (at once if the service is silent).

        While the operator's pause is in force it returns `pause` at the deadline, or the moment it is lifted.
        """
        deadline = time.monotonic() + deadline_s
        with self._changed:
            while not self._is_decided(repetition):
                left = deadline - time.monotonic()
                if left <= 0 or not (self.is_connected or self._in_force == "pause"):
                    break
                self._changed.wait(min(left, 0.1))
            return self._commanded_advice() or self._decided_advice(repetition)

    def played(self, repetition: int, pulse: Pulse | SaturationBlock, *, next_pulse_in_ms: float | None = None) -> None:
        """Report what was really played. Returns at once; repeated until the service has it written down."""
        exact = request(PlayedPulse, b1_ut=pulse.b1_ut, offset_ppm=pulse.offset_ppm, t_sat_s=pulse.t_sat_s, t_rec_s=pulse.t_rec_s)
        message = request(
            Played, session_id=self.session_id, repetition=repetition, pulse=exact, next_pulse_in_ms=next_pulse_in_ms
        )
        with self._changed:
            self._reports.append(_Report(message))

    @property
    def n_unreported(self) -> int:
        """Reports that the service has not confirmed yet."""
        return len(self._reports)

    def close(self, timeout_s: float = 2.0) -> None:
        """Deliver what is left, as far as the service listens, and disconnect."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not (self._outbox or self._reports) or not self.is_connected, timeout_s)
            self._stopping = True
        self._thread.join(max(0.5, deadline - time.monotonic()) + 1.0)

    # In the caller's thread, with the lock.

    def _is_decided(self, repetition: int) -> bool:
        if self._commands or self._in_force in ("stop", "abort"):
            return True
        if self._in_force == "pause":
            return False
        if repetition == 0:
            return True
        return self._decision is not None and self._decision.repetition >= repetition - 1

    def _commanded_advice(self) -> Advice | None:
        """Carry out the commands that have not expired; what they leave in force until the operator says otherwise."""
        for command_id, (command, expires) in list(self._commands.items()):
            del self._commands[command_id]
            if time.monotonic() >= expires:
                continue
            self._carried_out.add(command_id)
            self._outbox.append(CommandAck(session_id=self.session_id, command_id=command_id, outcome="done"))
            if self._in_force != "abort":  # nothing takes an abort back
                self._in_force = None if command == "resume" else command
        if self._in_force is None:
            return None
        return Advice(self._in_force, None, f"The operator commanded {self._in_force}.", self._decision)

    def _decided_advice(self, repetition: int) -> Advice:
        decision = self._decision
        if repetition == 0:
            return Advice("continue", None, "The first repetition is played as scheduled.")
        if decision is None:
            return Advice("continue", None, self._silence(), is_fallback=True)
        if repetition > decision.valid_until_repetition:
            self._answer(decision, "expired", f"Repetition {repetition} begins.")
            return Advice("continue", None, self._silence(), decision, is_fallback=True)
        if self.mode == "advice":
            self._answer(decision, "advice")
            return Advice("continue", None, f"Advice only: {decision.reason}", decision)
        return self._obey(decision)

    def _obey(self, decision: Decision) -> Advice:
        if decision.action == "stop":
            self._answer(decision, "obeyed")
            return Advice("stop", None, decision.reason, decision)
        refusal = None if decision.next_pulse is None else self._refusal(decision.next_pulse)
        if refusal is not None:
            self._answer(decision, "refused", refusal)
            return Advice("continue", None, refusal, decision)
        self._answer(decision, "obeyed")
        return Advice("continue", decision.next_pulse, decision.reason, decision)

    def _refusal(self, pulse: SuggestedPulse) -> str | None:
        if self._refuse is None:
            return None
        try:
            return self._refuse(pulse)
        except Exception as error:  # not ours; a pulse that could not be judged is not played
            log.exception("refuse failed")
            return f"The pulse could not be judged: {type(error).__name__}."

    def _answer(self, decision: Decision, outcome: DecisionOutcome, reason: str = "") -> None:
        if decision.sequence_number > self._answered:
            self._answered = decision.sequence_number
            self._outbox.append(
                DecisionAck(
                    session_id=self.session_id, sequence_number=decision.sequence_number, outcome=outcome, reason=reason[:1000]
                )
            )

    def _silence(self) -> str:
        refused = self._refused
        if refused is not None:
            return f"The service refuses this controller ({refused.reason}): approved schedule."
        return (
            "No valid decision in time: approved schedule." if self.is_connected else "The service is silent: approved schedule."
        )

    # In the library's thread.

    def _run(self) -> None:
        heartbeat: int | None = None
        heartbeat_at = 0.0
        while not self._stopping:
            now = time.monotonic()
            try:
                if now >= heartbeat_at:
                    heartbeat_at = now + self._heartbeat_s
                    if heartbeat is not None:
                        self._client.forget(heartbeat)
                    heartbeat = self._client.post(self._subscription())
                self._send_outbox()
                self._send_reports(now)
                self._client.take_in(_POLL_S)
            except ScansteerError as error:  # no connection: everything is kept and tried again
                log.debug("%s", error)
            heartbeat = self._take_answers(heartbeat)
            self._take_messages()
        self._client.disconnect()

    def _subscription(self) -> Subscribe:
        last = -1 if self._decision is None else self._decision.sequence_number
        return request(
            Subscribe,
            session_id=self.session_id,
            mode=self.mode,
            reports_played=self._reports_played,
            last_decision=last,
            controller_id=self._controller_id,
        )

    def _send_outbox(self) -> None:
        while self._outbox:
            self._client.forget(self._client.post(self._outbox[0]))
            with self._changed:
                self._outbox.popleft()
                self._changed.notify_all()

    def _send_reports(self, now: float) -> None:
        for report in list(self._reports):
            if report.number is None or now - report.sent_at > _FIRST_REPEAT_S:
                if report.number is not None:
                    self._client.forget(report.number)
                report.number, report.sent_at = self._client.post(report.message), now

    def _take_answers(self, heartbeat: int | None) -> int | None:
        answer = None if heartbeat is None else self._client.answer_to(heartbeat)
        with self._changed:
            if answer is not None:
                self._refused = answer if isinstance(answer, Refused) else None
                self._last_heard = time.monotonic()
                heartbeat = None
            for report in list(self._reports):
                confirmed = None if report.number is None else self._client.answer_to(report.number)
                if isinstance(confirmed, Refused):
                    log.warning("report of repetition %d refused: %s", report.message.repetition, confirmed.reason)
                if confirmed is not None and not _is_passing(confirmed):
                    self._reports.remove(report)
            self._changed.notify_all()
        return heartbeat

    def _take_messages(self) -> None:
        while (message := self._client.receive(0)) is not None:
            with self._changed:
                self._last_heard = time.monotonic()
                if isinstance(message, DecisionMessage) and message.session_id == self.session_id:
                    self._take_decision(message.decision)
                command = self._take_command(message) if isinstance(message, Command) else None
                self._changed.notify_all()
            if command is not None:
                self._announce(command)

    def _announce(self, command: CommandName) -> None:
        if self._on_command is None:
            return
        try:
            self._on_command(command)
        except Exception:  # not ours, and the connection has to go on
            log.exception("on_command failed")

    def _take_decision(self, decision: Decision) -> None:
        if self._decision is None or decision.sequence_number > self._decision.sequence_number:
            self._decision = decision

    def _take_command(self, message: Command) -> CommandName | None:
        """Note a command; its name the first time it comes."""
        if message.session_id != self.session_id or message.command_id in self._commands:
            return None
        if message.command_id in self._carried_out:  # the acknowledgement was lost
            self._outbox.append(CommandAck(session_id=self.session_id, command_id=message.command_id, outcome="done"))
            return None
        self._commands[message.command_id] = message.command, time.monotonic() + message.expires_in_s
        return message.command


def _is_passing(answer: WireMessage) -> bool:
    """Whether a report should be sent again although it was answered."""
    return isinstance(answer, Refused) and answer.code in ("unknown-session", "disk", "busy", "failed")
