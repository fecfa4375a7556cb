"""What uvicorn does not limit: how long a request may take to arrive, and how many connections are open.

Owns the clock of each connection. Knows nothing of what is asked and answered.
"""

import asyncio
from typing import Any, cast, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

RECEIVE = 15.0
"""Seconds until a request has arrived completely, from the connection or the last answer on."""
ANSWER = 120.0
"""Further seconds for the answer."""
MOST = 100
"""Open connections of a worker."""


@final
class LimitedHttp(H11Protocol):
    """uvicorn's HTTP, which ends connections whose request does not arrive in time, or that are too many.

    If there are too many, the one that has waited longest for its request goes, so half-sent requests lock nobody out.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._await_request()
        others = [cast(LimitedHttp, other) for other in self.connections]
        others = [other for other in others if not other.transport.is_closing()]
        if len(others) > MOST:
            waiting = [other for other in others if other is not self and not other.is_answering]
            min(waiting, key=lambda other: other.since, default=self).transport.abort()

    @property
    def is_answering(self) -> bool:
        """Whether a request has arrived completely and is not answered yet."""
        has_arrived = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return has_arrived and self.cycle is not None and not self.cycle.response_complete

    def _await_request(self) -> None:
        self.since = self.loop.time()
        self._deadline = self.loop.call_later(RECEIVE, self._is_late)

    def _is_late(self) -> None:
        if self.is_answering:
            self._deadline = self.loop.call_later(ANSWER, self.transport.abort)
        else:
            self.transport.abort()  # close() would wait until the client has read what was sent

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._deadline.cancel()
        self._await_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the clock."""
        self._deadline.cancel()
        super().connection_lost(exc)


HTTP_OPTIONS: dict[str, Any] = {
    "http": LimitedHttp,
    "ws": "none",
    "log_level": "error",  # a warning would be a line for each broken request
    "server_header": False,
    "timeout_graceful_shutdown": 10,
    "timeout_worker_healthcheck": 60,  # with 5, a busy machine kills workers before they have imported torch
}
"""For uvicorn."""
