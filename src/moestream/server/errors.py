"""Errors in the shapes of the two APIs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from moestream.errors import ConfigError, MoestreamError, RequestError, TemplateError

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(MoestreamError):
    """A request is answered with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


def unsupported(param: str, why: str) -> ApiError:
    """A parameter that would have to be ignored."""
    return ApiError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def as_api_error(error: Exception) -> ApiError:
    """What an exception means for the client; everything not foreseen is the server's fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | TemplateError | ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, MoestreamError):
        return ApiError(500, str(error))
    return ApiError(500, f"the server failed: {type(error).__name__}")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error of a body that does not fit its model.

    Of a union pydantic reports every alternative; the one that fits furthest is what was meant.
    """
    worst = max(errors, key=lambda e: len(e["loc"]))
    place = [part for part in worst["loc"] if part != "body"]
    # names of the alternatives of a union stand between those of fields
    param = ".".join(str(p) for p in place if isinstance(p, int) or (p.isidentifier() and p not in ("str", "int")))
    if worst["type"] == "extra_forbidden":
        return unsupported(param, "this parameter is not supported")
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {worst.get('ctx', {}).get('error', 'malformed')}")
    if not param:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    return ApiError(400, f"{param}: {worst['msg']}", param=param, code="invalid_value")


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The body of an answer on ``path``."""
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    kind = OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError, path: str) -> Response:
    """An answer in the shape of the API that ``path`` belongs to."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return json_response(error_body(error, path), error.status, headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON that holds nothing but ASCII: half a surrogate pair out of a request must not break the answer to it."""
    return Response(json.dumps(value), status, dict(headers or {}), "application/json")
