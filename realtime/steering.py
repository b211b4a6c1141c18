"""Controllers and the operator: decisions and commands on their way, what was played, and what became of it all."""

from __future__ import annotations

import time
from collections.abc import Callable

from scansteer.realtime.attendance import Controller, PendingCommand, Requester
from scansteer.realtime.codec import ProtocolError
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.hosted import HostedSession
from scansteer.realtime.messages import (
    Command,
    CommandAck,
    CommandOutcome,
    Control,
    Decision,
    DecisionAck,
    DecisionMessage,
    Done,
    Played,
    SessionMessage,
    Subscribe,
)
from scansteer.realtime.outbox import Outbox, Outgoing, to
from scansteer.realtime.request import Request


class Steering:
    """What the service does for the controllers of its sessions."""

    def __init__(self, config: ServeConfig, outbox: Outbox, clock: Callable[[], float]) -> None:
        self._config = config
        self._outbox = outbox
        self._clock = clock

    # What controllers and the operator say.

    def subscribe(self, session: HostedSession, message: Subscribe, request: Request) -> list[Outgoing]:
        acting = message.mode == "acting"
        if acting and session.advice_only:
            raise ProtocolError("not-allowed", "The operator allows advice only in this session.")
        session.attendance.make_way(request.identity, message, request.user)
        session.attendance.check_controller(request.identity, acting, self._config.limits.max_controllers)
        if (acting or message.reports_played) and not session.waits_or_ended:
            session.apply(message, session.append(request.frames))
        controller = self._attend(session, message, request)
        outgoing = self.done(message, request)
        for decision in session.decisions[max(message.last_decision, controller.sent) + 1 :]:
            outgoing.append(self._send(request.identity, controller, decision))
        return outgoing

    def played(self, session: HostedSession, message: Played, request: Request) -> list[Outgoing]:
        session.check_played(message)
        if message.repetition >= self._config.limits.max_repetitions:
            raise ProtocolError("limit", f"Repetition {message.repetition} is beyond the {self._config.limits.max_repetitions} accepted.")
        if message.next_pulse_in_ms is not None:
            session.times.deadline[message.repetition] = time.perf_counter() + message.next_pulse_in_ms * 1e-3
        if session.sequencer.played(message.repetition) is None:
            session.apply(message, session.append(request.frames))
            session.note("played", repetition=message.repetition, pulse=message.pulse.model_dump())
        return self.done(message, request)

    def control(self, session: HostedSession, message: Control, request: Request) -> list[Outgoing]:
        if message.command_id in session.commands:
            return self.done(message, request)
        session.check_control(message)
        session.apply(message, session.append(request.frames))
        about = {"repetition": message.repetition, "decision": message.decision}
        session.note("command", id=message.command_id, command=message.command, user=request.user, **about)
        outgoing = self.done(message, request)
        if message.command in ("pause", "resume", "stop", "abort"):
            outgoing += self._forward(session, message, request)
        return outgoing

    def decision_ack(self, session: HostedSession, message: DecisionAck, request: Request) -> list[Outgoing]:
        controller = session.attendance.controllers.get(request.identity)
        if controller is None:
            raise ProtocolError("not-allowed", "Only a controller that has subscribed acknowledges decisions.")
        number = message.sequence_number
        if number >= len(session.decisions):
            raise ProtocolError("conflict", f"There is no decision {number} yet.")
        controller.last_heard = self._clock()
        controller.acknowledged = max(controller.acknowledged, number)
        if number > controller.answered:
            controller.answered = number
            session.note("ack", decision=number, outcome=message.outcome, reason=message.reason, user=request.user)
        return []

    def command_ack(self, session: HostedSession, message: CommandAck, request: Request) -> list[Outgoing]:
        if request.identity not in session.attendance.controllers:
            raise ProtocolError("not-allowed", "Only a controller that has subscribed acknowledges commands.")
        pending = session.attendance.commands.pop(message.command_id, None)
        if pending is None:
            return []
        session.note("command_ack", id=message.command_id, outcome=message.outcome, reason=message.reason, user=request.user)
        return [_outcome(pending, message.outcome, message.reason)]

    def done(self, message: SessionMessage, request: Request) -> list[Outgoing]:
        """The request was carried out; said when it is durable."""
        done = Done(request_id=message.request_id, session_id=message.session_id)
        return self._outbox.hold(message.session_id, to(request.identity, done))

    # What goes out to them.

    def announce(self, session: HostedSession, decision: Decision) -> list[Outgoing]:
        """Send a new decision to every controller."""
        return [self._send(identity, controller, decision) for identity, controller in session.attendance.controllers.items()]

    def due(self, session: HostedSession) -> list[Outgoing]:
        """Let go of silent controllers; repeat what was not acknowledged."""
        now = self._clock()
        for identity in session.attendance.silent_controllers(now, self._config.controller_timeout_s):
            controller = session.attendance.controllers.pop(identity)
            session.note("controller gone", acknowledged=controller.acknowledged)
        return self._repeat_newest(session, now) + self._repeat_commands(session, now)

    def _attend(self, session: HostedSession, message: Subscribe, request: Request) -> Controller:
        controllers, now, acting = session.attendance.controllers, self._clock(), message.mode == "acting"
        controller = controllers.get(request.identity)
        if controller is None:
            session.note("controller", mode=message.mode, user=request.user)
            controller = controllers[request.identity] = Controller(acting, now)
        controller.acting, controller.last_heard = acting, now
        controller.controller_id, controller.user = message.controller_id, request.user
        controller.acknowledged = max(controller.acknowledged, message.last_decision)
        return controller

    def _forward(self, session: HostedSession, message: Control, request: Request) -> list[Outgoing]:
        """Send an operator's command to the controllers; held back until it is written down."""
        now = self._clock()
        command = Command(
            session_id=message.session_id,
            command_id=message.command_id,
            command=message.command,  # type: ignore[arg-type]  # the others do not come here
            expires_in_s=self._config.command_expires_s,
        )
        requester = Requester(request.identity, message.request_id)
        session.attendance.commands[message.command_id] = PendingCommand(command, requester, now, now)
        return self._outbox.hold(message.session_id, *(to(name, command) for name in session.attendance.controllers))

    def _send(self, identity: bytes, controller: Controller, decision: Decision) -> Outgoing:
        controller.sent, controller.sent_at = decision.sequence_number, self._clock()
        return to(identity, DecisionMessage(session_id=decision.session_id, decision=decision))

    def _repeat_newest(self, session: HostedSession, now: float) -> list[Outgoing]:
        """Only the newest decision is worth repeating: older ones have expired."""
        if not session.decisions:
            return []
        newest = session.decisions[-1]
        return [
            self._send(identity, controller, newest)
            for identity, controller in session.attendance.controllers.items()
            if controller.acknowledged < newest.sequence_number and now - controller.sent_at >= self._config.resend_s
        ]

    def _repeat_commands(self, session: HostedSession, now: float) -> list[Outgoing]:
        outgoing: list[Outgoing] = []
        for command_id, pending in list(session.attendance.commands.items()):
            if now - pending.issued_at > self._config.command_expires_s:
                del session.attendance.commands[command_id]
                outgoing.append(_outcome(pending, "expired", "No controller answered."))
            elif now - pending.sent_at >= self._config.resend_s:
                pending.sent_at = now
                left = self._config.command_expires_s - (now - pending.issued_at)
                command = pending.command.model_copy(update={"expires_in_s": max(left, 1e-3)})
                outgoing += [to(name, command) for name in session.attendance.controllers]
        return outgoing


def _outcome(pending: PendingCommand, outcome: str, reason: str) -> Outgoing:
    message = CommandOutcome(
        session_id=pending.command.session_id,
        command_id=pending.command.command_id,
        outcome=outcome,  # type: ignore[arg-type]  # CommandAck's outcomes are among these
        reason=reason,
    )
    return to(pending.requester.identity, message)
