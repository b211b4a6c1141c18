"""Settings of `scansteer serve` and `scansteer gateway`: YAML files of these models; without a file, the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scansteer.core.errors import InputError
from scansteer.protocols.scan import explain

DEFAULT_ENDPOINT = "tcp://127.0.0.1:9010"
DEFAULT_PUBLISH_ENDPOINT = "tcp://127.0.0.1:9011"

Seconds = Annotated[float, Field(gt=0, le=7 * 86400)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ImageLimits(Settings):
    """Bounds on one image, applied before anything is allocated."""

    max_image_bytes: Annotated[int, Field(ge=1024, le=2**31)] = 2**27
    max_voxels: Annotated[int, Field(ge=1, le=2**30)] = 2**24
    """Matrix x channels of one image."""


class Limits(ImageLimits):
    """Bounds on everything that a client of the service controls, applied before anything is allocated."""

    max_repetitions: Annotated[int, Field(ge=1, le=65536)] = 4096
    max_sessions: Annotated[int, Field(ge=1, le=1000)] = 16
    """Open at once."""
    max_session_bytes: Annotated[int, Field(ge=2**20)] = 2**35
    """Of one session's journal."""
    max_queue: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Messages that wait in a socket's queue, per peer."""
    max_queue_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 2**32
    """Of images that wait to be taken in, per peer; `max_image_bytes` decides how many that are."""
    max_unread_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 2**28
    """Of maps that a peer asked for and has not read, beyond the first; it is sent no more before it reads."""
    max_session_idle_s: Seconds = 12 * 3600.0
    """A session that nothing is heard of for so long is closed."""
    max_controllers: Annotated[int, Field(ge=1, le=1000)] = 8
    """Per session."""


Role = Literal["watch", "images", "control"]


class Keys(Settings):
    """CURVE keys; `scansteer keys new DIR` makes them."""

    secret: Path
    """Own `NAME.key_secret`, readable by its owner only (0600)."""
    allowed: Path | None = None
    """Service: folder of the public `NAME.key` files of the clients that may connect."""
    service: Path | None = None
    """Client: the service's public `service.key`."""
    roles: dict[str, Role] = {}
    """Service: what the key `NAME.key` of the allowed ones may do, where that is less than everything: `watch` (status, decisions,
    maps), or `images` (also open and close sessions and send images)."""


class ServeConfig(Settings):
    """The ZeroMQ service."""

    endpoint: str = DEFAULT_ENDPOINT
    """Images, control and decisions (ROUTER)."""
    publish_endpoint: str = DEFAULT_PUBLISH_ENDPOINT
    """Decisions for watchers (PUB)."""
    data_dir: Path = Path("scansteer-sessions")
    """Journals; one folder per session."""
    keys: Keys | None = None
    """Needed for any address that is not loopback."""
    http_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Loopback port with /health, /ready and /metrics over HTTP; none: no such port."""
    fsync: bool = True
    """Only a benchmark has a reason to switch this off."""
    warm_scans: tuple[str, ...] = ()
    """Names or files of the scans that are expected: compiled when the service starts."""
    worker_threads: Annotated[int, Field(ge=1, le=64)] = 1
    controller_timeout_s: Seconds = 5.0
    """A controller not heard of for so long counts as gone."""
    resend_s: Seconds = 0.5
    """A decision or command that is not acknowledged, and a request to fill a gap, are repeated after this time."""
    command_expires_s: Seconds = 30.0
    retention_days: Annotated[float, Field(gt=0, le=36500)] | None = None
    """Closed sessions older than this are purged when the service starts; none: kept until `scansteer sessions purge`."""
    limits: Limits = Limits()


class GatewayConfig(Settings):
    """MRD v1 over TCP in, ZeroMQ out, maps back."""

    host: str = "127.0.0.1"
    """MRD over TCP knows no authentication: loopback, or a private link to the reconstruction host."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9002
    allow_remote: bool = False
    """Must be set for any host that is not loopback."""
    endpoint: str = DEFAULT_ENDPOINT
    keys: Keys | None = None
    scan: str | None = None
    """Name or file, for peers that name none."""
    scans_dir: Path | None = None
    """Folder whose `NAME.yaml` files a peer may choose by name; it never reads another file."""
    dialect: Literal["auto", "fire", "gadgetron"] = "auto"
    max_connections: Annotated[int, Field(ge=1, le=1000)] = 16
    maps_every: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Send maps back after every so many images; none: at the end only."""
    send_maps: bool = True
    map_series: Annotated[int, Field(ge=1, le=65000)] = 1000
    """image_series_index of the first map series."""
    echo: Annotated[int, Field(ge=0, le=65535)] = 0
    """Of several echoes (header `contrast`), the one that is used; the others only pass."""
    set: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Header `set` that is used; none: the first one seen."""
    dynamic_index: Literal["repetition", "set", "contrast", "phase", "average", "image_index", "arrival"] = "repetition"
    """Header counter that numbers the repetitions; `arrival` counts the images as they come."""
    first_repetition: Annotated[int, Field(ge=0, le=65535)] = 0
    """Value of that counter in the first repetition (some reconstructions count from 1)."""
    n_slices: Annotated[int, Field(ge=1, le=1024)] | None = None
    """2-D images per repetition; none: as the MRD header's encoding limits say, else 1."""
    dummies: Annotated[int, Field(ge=0, le=1000)] = 0
    """Repetitions at the beginning that only pass; the schedule begins after them."""
    n_auxiliary: Annotated[int, Field(ge=0, le=8192)] = 0
    """Map and mask images that come before the first repetition; compilation waits for them."""
    reorder_repetitions: Annotated[int, Field(ge=0, le=1000)] = 4
    """A repetition that is missing when so many later ones have come is declared missing."""
    service_timeout_s: Seconds = 2.0
    finish_timeout_s: Seconds = 600.0
    """How long CLOSE may wait for the maps."""
    first_message_timeout_s: Seconds = 60.0
    """How long a connection may stay silent before its first message: it holds one of `max_connections`."""
    idle_timeout_s: Seconds = 3600.0
    """The same afterwards. A host that is gone without a word is noticed within two minutes."""
    catch_up_s: Seconds = 3600.0
    """How long images that the service has not taken yet are kept after their connection has ended."""
    max_kept_bytes: Annotated[int, Field(ge=2**20)] = 2**31
    """Per connection: images that the service has not taken yet, and images that the peer has not taken back yet."""
    limits: ImageLimits = ImageLimits()


Config = TypeVar("Config", bound=Settings)


def load(model: type[Config], path: Path | None) -> Config:
    """Read a configuration; none: the defaults.

    Raises
    ------
    InputError
        One sentence naming the file, the field and the value.
    """
    if path is None:
        return model()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: a date that is none, nested without end
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict | None):
        raise InputError(f"{path} does not hold settings: expected a mapping of names to values, got {type(data).__name__}.")
    try:
        return model.model_validate({} if data is None else data)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, 'realtime/config.py')}") from error
