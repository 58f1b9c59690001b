"""Errors of the server as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_LONGEST = 500
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_log = logging.getLogger("moe-serve")


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        param: field of the request that is wrong.
        code: for programs, such as model_not_found.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, usual)
        message = self.message if len(self.message) <= _LONGEST else f"{self.message[:_LONGEST]}..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Those that belong to the status."""
        return {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(self.status, {})

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)

    def content(self) -> bytes:
        """The body of the answer."""
        return json.dumps(self.body).encode()


def install(app: FastAPI) -> None:
    """Answer every error with an error object."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and request.method == "POST":
            return RequestError(415, "send the body with Content-Type: application/json").response()
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        response = RequestError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s", request.method, request.url.path, exc_info=error)
        return RequestError(500, "internal error; the server's log has the details").response()


def _of_validation(error: RequestValidationError) -> RequestError:
    """The first problem of a body, with its field."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    place = [str(part) for part in problem["loc"] if part != "body"]
    # Of a field with several types the first part is its name, further ones name a type.
    param = place[0] if place else None
    message = f"{param}: {problem['msg']}" if param else f"the body: {problem['msg']}"
    if problem["type"] == "extra_forbidden":
        message = f"{'.'.join(place)} is not a parameter that this server has"
    return RequestError(400, message, param)
