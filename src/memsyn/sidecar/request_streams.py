"""Requests that are sent instead of logged: a pipe, and a port of this machine.

Owns that no sender can take the memory, the threads or the time of the process. Must not know what a request holds.
A pipe is read as fast as it is measured, and its writer waits. A sender over HTTP never waits for a measurement: if
`MAX_WAITING` bodies wait, it gets 503.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Full, Queue
from typing import Any, Final, final
from urllib.parse import urlsplit

from memsyn import OptionError
from memsyn.sidecar.lines import IDLE, LONGEST, Line, LineSplitter

MAX_WAITING: Final = 16
"""The most bodies that wait, of up to `LONGEST` bytes each."""

MAX_CONNECTIONS: Final = 32
DEADLINE: Final = 30.0
"""Seconds after which a connection is closed, whatever was sent."""

PORT: Final = 4318
"""That of OpenTelemetry over HTTP."""

LOOPBACK: Final = {"localhost", "127.0.0.1", "::1"}


@final
class RequestPipe:
    """Yields the lines of standard input, or of another open file, and None while there is nothing new."""

    def __init__(self, number: int = 0) -> None:
        self.ending, self._number = False, number
        """Set `ending` to end after the present line."""

    def close(self) -> None:
        """There is nothing to close: the file is its opener's."""

    def __iter__(self) -> Iterator[Line | None]:
        lines, number = LineSplitter(), self._number
        while not self.ending:
            if not select.select([number], [], [], IDLE)[0]:
                yield None
                continue
            chunk = os.read(number, 2**16)
            for line in lines.feed(chunk) if chunk else lines.finish():
                yield line
                if self.ending:
                    return
            if not chunk:
                return


@final
class RequestServer:
    """Yields the lines of POSTed bodies, and None while there is nothing new. A body of JSON is one line.

    Args:
        url: `http`, or the address to listen on: `http://127.0.0.1:4318`.

    Raises:
        OptionError: nothing can listen there.

    Attributes:
        address: the URL that is listened on.
        is_local: whether only this machine reaches it.
        num_refused: bodies that found no room, and connections above the most.
    """

    def __init__(self, url: str) -> None:
        self.ending = False
        """Set it to listen no longer, and to end after what waits."""
        self._bodies: Queue[tuple[bool, bytes]] = Queue(MAX_WAITING)
        self.num_refused = 0
        try:
            found = urlsplit("http://127.0.0.1" if url == "http" else url)
            host, port = found.hostname or "", PORT if found.port is None else found.port
            self._server = _Server(self, host, port)
        except (OSError, ValueError, OverflowError) as error:
            raise OptionError(
                f"--from {url}: nothing can listen there: {error}. Give http, or http://127.0.0.1:PORT with a free "
                "port."
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(IDLE,), daemon=True)
        self.is_local = host in LOOPBACK
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}"

    def put(self, is_one_line: bool, body: bytes) -> bool:
        """Let a body wait; returns whether there was room. Called from any thread."""
        try:
            self._bodies.put_nowait((is_one_line, body))
        except Full:
            self.num_refused += 1
            return False
        return True

    def __iter__(self) -> Iterator[Line | None]:
        lines = LineSplitter()
        self._thread.start()
        while not self.ending:
            try:
                body = self._bodies.get(timeout=IDLE)
            except Empty:
                yield None
            else:
                yield from _lines_of(body, lines)
        self.close()
        while not self._bodies.empty():
            yield from _lines_of(self._bodies.get(), lines)

    def close(self) -> None:
        """Listen no longer."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _lines_of(body: tuple[bool, bytes], lines: LineSplitter) -> Iterator[Line]:
    is_one_line, data = body
    # Within JSON, a line break is a space: in its texts it is written as two characters.
    yield from lines.feed(data.replace(b"\n", b" ") if is_one_line else data)
    yield from lines.finish()


@final
class _Server(ThreadingHTTPServer):
    """Gives each connection a thread and a deadline."""

    daemon_threads = True
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(self, inbox: RequestServer, host: str, port: int) -> None:
        self.inbox, self._slots = inbox, threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Post)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin with a connection, or close it if there are too many."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.inbox.num_refused += 1
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection until its deadline."""
        timer = threading.Timer(DEADLINE, _end, [request])
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks off is the sender's business."""


def _end(connection: socket.socket) -> None:
    with suppress(OSError):  # it ended just now
        connection.shutdown(socket.SHUT_RDWR)  # wakes who reads from it


@final
class _Post(BaseHTTPRequestHandler):
    """Takes one body, and answers as OpenTelemetry expects it."""

    server: _Server
    timeout = 10.0
    server_version, sys_version = "memsyn", ""

    def do_POST(self) -> None:
        """Queue the body, or say why not."""
        code, reason = self._take()
        self.send_response(code)
        self.send_header("Content-Type", "application/json" if code == 200 else "text/plain")
        if code == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(reason.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing of a request is logged."""

    def _take(self) -> tuple[int, str]:
        inbox, headers = self.server.inbox, self.headers
        host = urlsplit(f"//{headers.get('Host', '')}").hostname
        if "Origin" in headers or (inbox.is_local and host not in LOOPBACK):
            return 403, "web pages may not send requests"
        if "protobuf" in headers.get_content_type():
            return 415, "send OTLP as JSON: in a collector, encoding: json"
        length = headers.get("Content-Length", "")
        if not length.isdecimal():
            return 411, "send a Content-Length"
        if len(length) > 9 or int(length) > LONGEST:
            return 413, f"send at most {LONGEST} bytes"
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return 400, "the body is cut off"
        encoding = headers.get("Content-Encoding", "identity")
        if encoding == "gzip":
            unpacker = zlib.decompressobj(31)
            with suppress(zlib.error):
                body = unpacker.decompress(body, LONGEST + 1)
            if len(body) > LONGEST:
                return 413, f"send at most {LONGEST} bytes, unpacked"
            if not unpacker.eof:
                return 400, "the body is no gzip"
        elif encoding != "identity":
            return 415, "send a body as it is, or as gzip"
        if inbox.ending or not inbox.put(headers.get_content_type() == "application/json", body):
            return 503, "too many requests wait"
        return 200, "{}"
