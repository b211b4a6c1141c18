"""Who may connect: loopback without keys, everything else with CURVE keys and a list of allowed clients.

CURVE encrypts and proves that the peer holds a key; only the ZAP handler, which compares that key with the allowed ones, makes it
a lock. `scansteer keys new DIR` lays out: `service.key_secret` and `service.key`, `client.key_secret`, and `allowed/client.key`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from scansteer.core.errors import InputError
from scansteer.realtime.config import Keys

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach an endpoint: ipc, inproc, or TCP on a loopback address."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return True
    return endpoint.startswith("tcp://") and is_loopback(endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]"))


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine. Names other than `localhost` are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_endpoint(endpoint: str, keys: Keys | None) -> None:
    """Refuse to open an endpoint to others without keys and a list of clients.

    Raises
    ------
    InputError
        With the way out.
    """
    check_endpoint_form(endpoint)
    if is_local(endpoint):
        return
    if keys is None or keys.allowed is None:
        raise InputError(
            f"Endpoint {endpoint} can be reached by others: set keys.secret and keys.allowed (`scansteer keys new DIR` makes "
            "them) or use tcp://127.0.0.1."
        )


def check_endpoint_form(endpoint: str) -> None:
    """
    Raises
    ------
    InputError
        Not a ZeroMQ address that scansteer uses.
    """
    if not re.match(r"^(tcp://.+:(\d+|\*)|ipc://.+|inproc://.+)$", endpoint):
        raise InputError(f"Endpoint {endpoint!r} is not of the form tcp://ADDRESS:PORT or ipc://PATH.")
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp://") and port != "*" and int(port[:9]) > 65535:  # ZeroMQ would take what is left of it modulo 65536
        raise InputError(f"Endpoint {endpoint!r} has a port beyond 65535; choose one below.")


class Guard:
    """The ZAP handler of a context: lets in the keys of one folder. Must be open before the sockets are bound."""

    def __init__(self, context: zmq.Context, keys: Keys) -> None:
        """
        Raises
        ------
        InputError
            No allowed key, a role of a key that is not allowed, or a key file that cannot be read or that others can read.
        """
        if keys.allowed is None:
            raise InputError("keys.allowed is missing: the folder with the public keys of the clients that may connect.")
        self._names = read_allowed(keys.allowed)
        unknown = sorted({*keys.roles} - {*self._names.values()})
        if unknown:
            raise InputError(f"keys.roles names {', '.join(unknown)}; {keys.allowed} has no such key.")
        self._public, self._secret = read_secret(keys.secret)
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=keys.allowed)

    def protect(self, socket: zmq.Socket) -> None:
        """Make a socket accept CURVE clients from the list only. Before `bind`."""
        socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
        socket.curve_server = True

    def name_of(self, user_id: str) -> str:
        """The name of the file that a connected client's key came from."""
        return self._names.get(user_id, "")

    def close(self) -> None:
        self._authenticator.stop()


def protect_client(socket: zmq.Socket, keys: Keys) -> None:
    """Give a connecting socket its own keys and the service's. Before `connect`.

    Raises
    ------
    InputError
        A key file is missing, cannot be read, or is readable by others.
    """
    if keys.service is None:
        raise InputError("keys.service is missing: the service's public key file (service.key).")
    socket.curve_publickey, socket.curve_secretkey = read_secret(keys.secret)
    socket.curve_serverkey = _read(keys.service)[0]


def make_keys(folder: Path, clients: tuple[str, ...] = ("client",)) -> list[Path]:
    """Write a new key pair for a service and for each client; secret files are readable by their owner only.

    Raises
    ------
    InputError
        The folder cannot be made or holds keys already (they are never overwritten), or a name cannot be a file name.
    """
    for name in clients:
        if not _NAME.match(name) or name == "service":
            raise InputError(f"A client cannot be called {name!r}; use letters, digits, - and _, and not 'service'.")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "allowed").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make folder {folder}: {error.strerror}.") from error
    written: list[Path] = []
    for name in ("service", *clients):
        place = folder if name == "service" else folder / "allowed"
        written += [_write_new(folder / f"{name}.key_secret"), _write_new(place / f"{name}.key")]
    for secret, public in zip(written[::2], written[1::2], strict=True):
        _fill(secret, public)
    return written


def read_secret(path: Path) -> tuple[bytes, bytes]:
    """(public, secret) of a `NAME.key_secret` file.

    Raises
    ------
    InputError
        Missing, not a key file, or readable by others than its owner.
    """
    public, secret = _read(path)
    if secret is None:
        raise InputError(f"Key file {path} holds no secret key.")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(f"Secret key {path} is open to others (mode {mode:04o}); run chmod 600 on it, or make new keys.")
    return public, secret


def read_allowed(folder: Path) -> dict[str, str]:
    """Z85 public key -> name, of the `NAME.key` files in a folder.

    Raises
    ------
    InputError
        The folder cannot be read, holds no key, a file in it is not a key, or anybody may write there.
    """
    files = sorted(folder.glob("*.key")) if folder.is_dir() else []
    if not files:
        raise InputError(f"No client may connect: {folder} holds no NAME.key file.")
    for path in (folder, *files):
        if (mode := stat.S_IMODE(path.stat().st_mode)) & stat.S_IWOTH:
            raise InputError(f"Anybody may write {path} (mode {mode:04o}), and so let themselves in; run chmod o-w on it.")
    return {_read(path)[0].decode("ascii"): path.stem for path in files}


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read key file {path}: {error}.") from error
    if any(key is not None and len(key) != 40 for key in (public, secret)):
        raise InputError(f"Key file {path} does not hold CURVE keys of 40 characters.")
    return public, secret


def _write_new(path: Path) -> Path:
    mode = 0o600 if path.suffix == ".key_secret" else 0o644
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    except FileExistsError as error:
        raise InputError(f"{path} exists already; keys are never overwritten, choose another folder.") from error
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}.") from error
    return path


def _fill(secret_path: Path, public_path: Path) -> None:
    """The file format of `zmq.auth`."""
    public, secret = zmq.curve_keypair()
    head = f'metadata\n    name = {secret_path.stem}\ncurve\n    public-key = "{public.decode("ascii")}"\n'
    public_path.write_text("# scansteer: public key, may be given to others\n" + head, encoding="ascii")
    secret_path.write_text(f'# scansteer: SECRET key\n{head}    secret-key = "{secret.decode("ascii")}"\n', encoding="ascii")
