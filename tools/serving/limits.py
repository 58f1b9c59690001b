"""What is checked of a request before the application sees it: token, size of the body, and how long it takes to come.

Plain ASGI, because the body of a request must not be read before it is known to be small enough.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tools.serving.errors import RequestError

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = ("/health",)
BODY_TIMEOUT_S = 30.0


class _Gone(Exception):
    """The client has disconnected."""


class Gate:
    """Checks the token, and reads the whole body, before it calls `app`.

    Args:
        token: that requests must bear; None lets all in.
        max_body_bytes: of a body.
        count: is given the path of the route and the status of each answer.
        timeout_s: that a body may take.
    """

    def __init__(
        self, app: App, token: str | None, max_body_bytes: int, count: Callable[[str, int], None],
        timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:  # fmt: skip
        self._app, self._max_body_bytes, self._timeout_s, self._count = app, max_body_bytes, timeout_s, count
        self._authorization = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                self._count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._authenticate(scope["path"], headers)
            body = await self._body(headers, receive)
        except RequestError as error:
            await _answer(error, counted)
            return
        except _Gone:
            return
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> AsgiMessage:
            part = next(parts, None)
            return part if part is not None else await receive()

        await self._app(scope, replay, counted)

    def _authenticate(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._authorization is None or path in _OPEN_PATHS:
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._authorization):
            raise RequestError(401, "the token is missing or wrong: send it as `Authorization: Bearer TOKEN`")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise RequestError(408, f"the body took longer than {self._timeout_s:g} s") from None

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body is larger than serve.max_body_bytes={self._max_body_bytes}")


async def _answer(error: RequestError, send: Send) -> None:
    content = error.content()
    # What follows on the connection may be the rest of the body.
    headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    fields = [(name.lower().encode(), value.encode()) for name, value in {**headers, **error.headers}.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": fields})
    await send({"type": "http.response.body", "body": content})
