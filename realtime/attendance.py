"""Who takes part in a session right now. None of it outlives the process: clients say it again when they reconnect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from scansteer.realtime.codec import ProtocolError
from scansteer.realtime.messages import Command, Subscribe


class Requester(NamedTuple):
    """Where an answer goes that cannot be given at once."""

    identity: bytes
    request_id: int


@dataclass
class Controller:
    """A connected controller, as far as the service knows it."""

    acting: bool
    last_heard: float
    controller_id: str = ""
    user: str = ""
    """Name of the key that it connected with."""
    acknowledged: int = -1
    """The last decision it has received."""
    answered: int = -1
    """The last decision of which it said what it did with it."""
    sent: int = -1
    sent_at: float = 0.0


@dataclass
class PendingCommand:
    """An operator's command on its way to the controllers."""

    command: Command
    requester: Requester
    issued_at: float
    sent_at: float


@dataclass
class Attendance:
    """The clients of one session."""

    source: bytes | None = None
    """Who sends the images."""
    closer: Requester | None = None
    controllers: dict[bytes, Controller] = field(default_factory=dict)
    commands: dict[str, PendingCommand] = field(default_factory=dict)
    maps_wanted: set[Requester] = field(default_factory=set)
    last_heard: float = 0.0
    gap_asked_at: float = 0.0

    @property
    def interested(self) -> set[bytes]:
        """Whoever sends the images, and the controllers."""
        return {*self.controllers, *([self.source] if self.source is not None else [])}

    def make_way(self, identity: bytes, message: Subscribe, user: str) -> None:
        """A controller whose line had dropped is back: what its old connection was known by is its new one's."""
        for name, controller in list(self.controllers.items()):
            is_same = message.controller_id and (controller.controller_id, controller.user) == (message.controller_id, user)
            if is_same and name != identity:
                del self.controllers[name]
                controller.sent = message.last_decision  # what went into the dead line goes out again
                self.controllers[identity] = controller

    def check_controller(self, identity: bytes, acting: bool, max_controllers: int) -> None:
        """Refuse a second acting controller, and one too many.

        Raises
        ------
        ProtocolError
            With the reason.
        """
        if acting and any(other.acting for name, other in self.controllers.items() if name != identity):
            raise ProtocolError("not-allowed", "Another controller is acting in this session; subscribe for advice.")
        if identity not in self.controllers and len(self.controllers) >= max_controllers:
            raise ProtocolError("limit", f"{len(self.controllers)} controllers take part already; watchers use the PUB socket.")

    def silent_controllers(self, now: float, timeout_s: float) -> list[bytes]:
        """Those not heard of for too long."""
        return [name for name, controller in self.controllers.items() if now - controller.last_heard > timeout_s]
