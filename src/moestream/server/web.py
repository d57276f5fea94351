"""The web page: files of the package, read once, under a policy that allows nothing from elsewhere."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response

from moestream.server.errors import ApiError
from moestream.server.guard import STATIC

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
"""No inline scripts or styles, nothing from elsewhere, and no HTML but what DOMPurify made."""
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",  # asked again each time, answered 304: a new version shows at once
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
"""Not left to ``mimetypes``, which the machine's own tables may change."""


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    kind: str
    etag: str


def _read(path: Path) -> _File:
    content = path.read_bytes()
    kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "text/plain"
    return _File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def add_web(app: FastAPI) -> None:
    """Add the page at ``/`` and what it consists of below ``STATIC``."""
    files = {path.relative_to(FOLDER).as_posix(): _read(path) for path in FOLDER.rglob("*") if path.is_file()}

    def answer(name: str, request: Request) -> Response:
        file = files.get(name)
        if file is None:
            raise ApiError(404, "there is no such file")
        headers = HEADERS | {"etag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(None, 304, headers)
        return Response(file.content, 200, headers, file.kind)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer(INDEX, request)

    @app.api_route(STATIC + "{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return answer(name, request)
