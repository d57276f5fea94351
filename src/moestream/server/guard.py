"""The outermost layer: who may ask, how much, and one log line for each request."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestream.server.errors import ApiError, as_api_error, error_response
from moestream.server.metrics import Metrics
from moestream.server.settings import LOCAL_NAMES, ServeSettings
from moestream.server.sse import Disconnected

if TYPE_CHECKING:
    from moestream.server.service import Generation

LOG = logging.getLogger("moestream.server")
OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
"""Need no key; whatever is below ``STATIC`` neither."""
STATIC = "/static/"


@dataclass(slots=True)
class RequestLog:
    """What the line of a request says."""

    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex[:24]}")
    status: int = 0
    end: str = ""
    """Why it did not end well."""
    reply_id: str = ""
    generation: Generation | None = None
    started: float = field(default_factory=time.monotonic)

    def watch(self, generation: Generation, reply_id: str) -> None:
        """The replies whose receipts belong into the line."""
        self.generation = generation
        self.reply_id = reply_id

    def line(self, method: str, path: str) -> str:
        """The line, as key=value pairs; no text of anybody's prompt is in it."""
        parts = [f"{method} {path} {self.status or '-'} {time.monotonic() - self.started:.3f}s id={self.id}"]
        if self.reply_id:
            parts.append(f"reply={self.reply_id}")
        for receipt in self.generation.receipts.values() if self.generation else ():
            ttft = "-" if receipt.ttft_s is None else f"{receipt.ttft_s:.3f}s"
            rate = "-" if receipt.decode_tok_s is None else f"{receipt.decode_tok_s:.1f}tok/s"
            parts.append(
                f"prompt={receipt.prompt_tokens} new={receipt.new_tokens} finish={receipt.finish_reason} ttft={ttft} "
                f"decode={rate} hits={receipt.hits} misses={receipt.misses} read={receipt.bytes_read} "
                f"stall={receipt.stall_s:.3f}s rss={receipt.peak_rss}"
            )
            parts += [f"LOSSY={setting!r}" for setting in receipt.setup.lossy]
        for index, job in enumerate(self.generation.jobs if self.generation else ()):
            if self.generation is not None and index not in self.generation.receipts:
                new = len(job.reply.sequence.tokens) if job.reply else 0
                parts.append(f"prompt={len(job.ids)} new={new} finish=cancelled")
        return " ".join([*parts, *([f"end={self.end}"] if self.end else [])])


class TooLarge(HTTPException):
    """The body is larger than allowed."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body has more than {limit} bytes")


class Guard:
    """ASGI middleware: checks host, origin and key, bounds the body, and logs."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        own = {socket.gethostname().lower(), settings.host.lower()}
        self._hosts = LOCAL_NAMES | own | {host.lower() for host in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        log = scope["moestream"] = RequestLog()
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                log.status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = answer["request-id"] = log.id
                if origin in self._settings.allowed_origins:
                    answer["access-control-allow-origin"] = str(origin)
                    answer["vary"] = "Origin"
            await send(message)

        try:
            early = self._check(scope, headers)
            if early is not None:
                await early(scope, receive, send_and_note)
            else:
                await self._app(scope, self._bounded(receive, headers), send_and_note)
        except Disconnected:
            log.end = "disconnected"
        except Exception as error:
            log.end = f"{type(error).__name__}"
            LOG.exception("a request failed")
            if not log.status:
                await error_response(as_api_error(error), scope["path"])(scope, receive, send_and_note)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, log.status or "disconnected").inc()
            LOG.info("%s", log.line(scope["method"], ascii(scope["path"])[1:-1]))

    def _check(self, scope: Scope, headers: Headers) -> Response | None:
        """An answer for requests that are not handed on."""
        try:
            self._check_source(headers)
            preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
            if preflight:
                allow = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
                asked = headers.get("access-control-request-headers", "authorization, content-type, x-api-key")
                return Response(None, 204, {**allow, "access-control-allow-headers": asked})
            if scope["path"] not in OPEN_PATHS and not scope["path"].startswith(STATIC):
                self._check_key(headers)
            if int(headers.get("content-length") or 0) > self._settings.max_body:
                raise ApiError(413, f"the body has more than {self._settings.max_body} bytes")
        except ApiError as error:
            return error_response(error, scope["path"])
        return None

    def _check_source(self, headers: Headers) -> None:
        """Refuse names that a stranger's DNS may point here, and pages of other servers."""
        host = headers.get("host", "")
        if not self._known(host):
            raise ApiError(403, f"Host {ascii(host)[:100]} is not served; allow it with --allowed-host", code="host")
        origin = headers.get("origin")
        if origin is None or origin in self._settings.allowed_origins:
            return
        if origin.split("://")[-1].lower() != host.lower():
            raise ApiError(
                403, f"Origin {ascii(origin)[:100]} is not allowed; allow it with --allowed-origin", code="origin"
            )

    def _known(self, host: str) -> bool:
        name = host.split("]", maxsplit=1)[0].removeprefix("[") if host.startswith("[") else host.rsplit(":", 1)[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._hosts
        return True  # an address cannot be re-pointed by anybody's DNS

    def _check_key(self, headers: Headers) -> None:
        key = self._settings.api_key
        if key is None:
            return
        bearer = headers.get("authorization", "")
        given = bearer[7:] if bearer.lower().startswith("bearer ") else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _bounded(self, receive: Receive, headers: Headers) -> Receive:
        """``receive`` that stops bodies sent without a length."""
        if headers.get("content-length") is not None:
            return receive  # the server process holds the client to it
        limit, seen = self._settings.max_body, 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise TooLarge(limit)
            return message

        return bounded
