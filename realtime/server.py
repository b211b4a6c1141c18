"""The ZeroMQ side of the service: one loop owns the sockets; everything else is the broker's and the worker's.

ROUTER for images, control and decisions; PUB for watchers; an inproc pair that wakes the loop when a job is done.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import zmq

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import load
from scansteer.realtime import stop_signals
from scansteer.realtime.auth import Guard, check_endpoint
from scansteer.realtime.broker import Broker
from scansteer.realtime.codec import MAX_ENVELOPE_BYTES, Bytes
from scansteer.realtime.compiled import keep_compiled
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.connection import milliseconds
from scansteer.realtime.freed_memory import allocate_in_one_arena
from scansteer.realtime.logs import log_to_stderr
from scansteer.realtime.outbox import Outgoing
from scansteer.realtime.sessions import purge_old
from scansteer.realtime.worker import Event, MakeSession, Worker

log = logging.getLogger("scansteer.server")

_TICK_S = 0.1
_BATCH = 64
_BATCH_BYTES = 2**18
"""Messages, or bytes, taken before the journals are made durable once for all of them: few enough to be in the cache still."""
_LARGE_BYTES = 2**16
_STOP_TIMEOUT_S = 10.0
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


class Server:
    """A service with its sockets bound. Use as a context manager; `run` blocks until `stop` is called from any thread."""

    def __init__(self, config: ServeConfig, make: MakeSession) -> None:
        """
        Raises
        ------
        InputError
            An endpoint is open to others without keys, or cannot be bound; a key file is not as it must be; a scan to be
            compiled beforehand is not one.
        ScansteerError
            Another service uses the data folder.
        """
        for endpoint in (config.endpoint, config.publish_endpoint):
            check_endpoint(endpoint, config.keys)
        expected = [load(name) for name in config.warm_scans]
        if config.retention_days is not None:
            purge_old(config.data_dir, config.retention_days)
        self._done: queue.SimpleQueue[tuple[str, list[Event]]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self.ended_cleanly = True
        """After `close`: no job is running any more."""
        self._wake_lock = threading.Lock()
        self._context = zmq.Context()
        self._unread: dict[bytes, list[tuple[zmq.MessageTracker, int]]] = {}
        """Large answers on their way, by peer, the oldest first."""
        self._guard: Guard | None = None
        self._http: ThreadingHTTPServer | None = None
        try:
            self._guard = Guard(self._context, config.keys) if config.keys is not None else None
            self._open_sockets(config)
            self._worker = Worker(self._deliver, config.worker_threads)
            self.broker = Broker(config, make, lambda session_id, job, slow: self._worker.submit(session_id, job, slow=slow))
            self.broker.publish_endpoint = self.publish_endpoint
            self.broker.warm(expected)
            self._metrics_text = self.broker.metrics_text()
            self._http = self._serve_http(config.http_port) if config.http_port is not None else None
        except BaseException:
            self._close_sockets()
            raise

    @property
    def endpoint(self) -> str:
        """Where clients connect (with the port that was really bound)."""
        return self._router.get_string(zmq.LAST_ENDPOINT)

    @property
    def publish_endpoint(self) -> str:
        return self._publisher.get_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self) -> None:
        """Serve until `stop`."""
        _spare_the_collector()
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        next_tick = time.monotonic()
        while not self._stopping.is_set():
            ready = dict(poller.poll(milliseconds(next_tick - time.monotonic())))
            outgoing: list[Outgoing] = []
            if self._woken in ready:
                outgoing += self._finished()
            if self._router in ready:
                outgoing += self._received()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_S
                outgoing += self.broker.tick()
                if self._http is not None:
                    self._metrics_text = self.broker.metrics_text()
            self._send(outgoing + self.broker.commit())

    def stop(self) -> None:
        """Make `run` return after what it is doing. May be called from any thread, and from a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """Let running jobs end, then close sockets and journals. Open sessions go on when a service starts on the same folder."""
        if self._context.closed:
            return
        self._stopping.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        self.ended_cleanly = self._worker.stop(_STOP_TIMEOUT_S)
        self._send(self._finished() + self.broker.commit())
        self.broker.close()
        self._close_sockets()

    def _open_sockets(self, config: ServeConfig) -> None:
        self._router = self._bound(zmq.ROUTER, config.endpoint, config)
        self._publisher = self._bound(zmq.PUB, config.publish_endpoint, config)
        self._woken = self._context.socket(zmq.PULL)
        self._woken.bind("inproc://woken")
        self._waking = self._context.socket(zmq.PUSH)
        self._waking.connect("inproc://woken")

    def _bound(self, kind: int, endpoint: str, config: ServeConfig) -> zmq.Socket:
        socket = self._context.socket(kind)
        socket.linger = 500
        socket.maxmsgsize = max(config.limits.max_image_bytes, MAX_ENVELOPE_BYTES)
        socket.sndhwm = config.limits.max_queue
        socket.rcvhwm = min(config.limits.max_queue, max(2, config.limits.max_queue_bytes // config.limits.max_image_bytes))
        socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20_000)
        if self._guard is not None:
            self._guard.protect(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise InputError(f"Cannot listen on {endpoint}: {error.strerror}; is another service running there?") from error
        return socket

    def _received(self) -> list[Outgoing]:
        outgoing: list[Outgoing] = []
        n_bytes = 0
        for _ in range(_BATCH):
            try:
                identity, frames, user = self._receive()
            except zmq.Again:
                break
            outgoing += self.broker.handle(identity, frames, user)
            n_bytes += sum(map(len, frames))
            if n_bytes > _BATCH_BYTES:
                break
        return outgoing

    def _receive(self) -> tuple[bytes, list[Bytes], str]:
        """One message: who sent it, its frames, and the name of the key it came with."""
        if self._guard is not None:
            first, *others = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            user_id = others[-1].get("User-Id") if others else ""
            return first.bytes, [_content(frame) for frame in others], self._guard.name_of(str(user_id))
        identity = self._router.recv(zmq.NOBLOCK)
        frame = self._router.recv(copy=False)  # a client's message has one part at least, or ZeroMQ does not deliver it
        frames = [_content(frame)]
        while frame.more:
            frame = self._router.recv(copy=False)
            frames.append(_content(frame))
        return identity, frames, ""

    def _finished(self) -> list[Outgoing]:
        while True:
            try:
                self._woken.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
        outgoing: list[Outgoing] = []
        while not self._done.empty():
            session_id, events = self._done.get()
            outgoing += self.broker.finished(session_id, events)
        return outgoing

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        """Send without waiting: a peer that does not read loses messages, and asks for them again."""
        for identity, frames in outgoing:
            try:
                if identity is None:
                    _send_frames(self._publisher, frames)
                elif sum(map(len, frames)) < _LARGE_BYTES:
                    _send_frames(self._router, [identity, *frames])
                else:
                    self._send_large(identity, frames)
            except zmq.Again:
                self.broker.metrics.refused("busy")

    def _send_large(self, identity: bytes, frames: Sequence[Bytes]) -> None:
        """Maps, unless too many that the peer has not read wait already."""
        waiting = [(tracker, n_bytes) for tracker, n_bytes in self._unread.get(identity, ()) if not tracker.done]
        size = sum(map(len, frames))
        if waiting and sum(n_bytes for _, n_bytes in waiting) + size > self.broker.config.limits.max_unread_bytes:
            raise zmq.Again
        tracker = self._router.send_multipart([identity, *frames], zmq.NOBLOCK, copy=False, track=True)
        self._unread[identity] = [*waiting, (tracker, size)]
        self._unread = {name: unread for name, unread in self._unread.items() if not unread[-1][0].done}

    def _serve_http(self, port: int) -> ThreadingHTTPServer:
        return _serve_http(lambda: self.broker.is_ready, lambda: self._metrics_text, port)

    def _deliver(self, session_id: str, events: list[Event]) -> None:
        """From the worker's threads: one PUSH socket, guarded by a lock."""
        self._done.put((session_id, events))
        with self._wake_lock:
            if not self._waking.closed:
                with contextlib.suppress(zmq.Again):  # a thousand wake-ups wait already
                    self._waking.send(b"", zmq.NOBLOCK)

    def _close_sockets(self) -> None:
        if self._guard is not None:
            self._guard.close()
        with self._wake_lock:
            self._context.destroy(linger=500)


def serve(config: ServeConfig, make: MakeSession, *, on_started: Callable[[Server], None] | None = None) -> None:
    """Run the service until SIGTERM, SIGINT or SIGHUP; returns when everything accepted is safe.

    Parameters
    ----------
    make
        Compiles a session.
    on_started
        Called once the sockets are bound, before the first message is taken.

    Raises
    ------
    InputError, ScansteerError
        The service cannot start as it is configured.
    """
    log_to_stderr()
    allocate_in_one_arena()
    keep_compiled(config.data_dir / ".compiled")  # no session can be called so
    with Server(config, make) as server, stop_signals.obeyed(server.stop):
        log.info("listening on %s, publishing on %s", server.endpoint, server.publish_endpoint)
        if on_started is not None:
            on_started(server)
        server.run()
        log.info("stopping")
    if not server.ended_cleanly:  # a compilation cannot be interrupted, and the interpreter aborts when it ends under one
        log.warning("a job was still running; its session goes on at the next start")
        logging.shutdown()
        os._exit(0)


def _spare_the_collector() -> None:
    """What was imported stays: no need to look at it again and again; and look less often, for hardly anything here has cycles."""
    gc.freeze()
    gc.set_threshold(20_000)


def _send_frames(socket: zmq.Socket, frames: Sequence[Bytes]) -> None:
    """`send_multipart` without waiting: ZeroMQ takes either all frames or not even the first."""
    *first, last = frames
    for frame in first:
        socket.send(frame, _MORE)
    socket.send(last, _LAST)


def _content(frame: zmq.Frame) -> Bytes:
    """Small frames are copied, for views are slow; large ones are left where they are."""
    return frame.bytes if len(frame) < _LARGE_BYTES else frame.buffer


def _serve_http(is_ready: Callable[[], bool], metrics_text: Callable[[], str], port: int) -> ThreadingHTTPServer:
    """/health, /ready and /metrics on loopback. Both functions are called from other threads: neither walks through what may grow meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            match self.path:
                case "/health":
                    self._answer(200, "ok\n")
                case "/ready":
                    self._answer(*((200, "ready\n") if is_ready() else (503, "compiling\n")))
                case "/metrics":
                    self._answer(200, metrics_text())
                case _:
                    self._answer(404, "not found: /health, /ready and /metrics are\n")

        def _answer(self, code: int, text: str) -> None:
            content = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class QuietServer(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, request: object, client_address: object) -> None:
            log.info("a request over HTTP was not answered: %s", sys.exception())

    try:
        server = QuietServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ScansteerError(f"Cannot listen on http://127.0.0.1:{port}: {error.strerror}.") from error
    threading.Thread(target=server.serve_forever, daemon=True, name="scansteer-http").start()
    return server
