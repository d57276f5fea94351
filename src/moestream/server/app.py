"""The application: routes of all APIs, and errors in the shape of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from moestream.errors import MoestreamError
from moestream.server.anthropic_messages import CountBody, MessagesBody, count_tokens, messages
from moestream.server.errors import ApiError, as_api_error, error_response, from_validation, json_response
from moestream.server.guard import Guard
from moestream.server.live import add_live
from moestream.server.openai_chat import ChatBody, chat_completions
from moestream.server.openai_completions import CompletionBody, completions
from moestream.server.openai_responses import ResponsesBody, responses
from moestream.server.schemas import Body
from moestream.server.service import Service
from moestream.server.web import add_web

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is wrong; the message names what"},
    401: {"description": "The key is missing or wrong"},
    403: {"description": "Host or origin are not allowed"},
    404: {"description": "There is no such model"},
    413: {"description": "The body is too large"},
    429: {"description": "The queue is full; see Retry-After"},
    500: {"description": "The server failed"},
    503: {"description": "The model is being loaded, or the server stops"},
    504: {"description": "The request took longer than the server allows"},
}


def create_app(service: Service) -> FastAPI:
    """The application around a service; its lifespan starts and stops the worker."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="moestream", version=version("moestream"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    _add_errors(app)
    _add_status(app, service)
    _add_apis(app, service)
    add_live(app, service)
    add_web(app)
    app.openapi = lambda: _document(app, service)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document, with the names that ``model`` may have."""
    if app.openapi_schema is None:
        app.openapi_schema = FastAPI.openapi(app)
        for schema in app.openapi_schema["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"]["enum"] = list(service.names)
    return app.openapi_schema


def _add_errors(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error), request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        found = cast(RequestValidationError, error).errors()
        return error_response(from_validation(found), request.url.path)

    async def http(request: Request, error: Exception) -> Response:
        problem = cast(HTTPException, error)
        answer = error_response(ApiError(problem.status_code, str(problem.detail)), request.url.path)
        answer.headers.update(problem.headers or {})
        return answer

    app.add_exception_handler(MoestreamError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["status"], responses={503: ERRORS[503]})
    async def health() -> Response:
        """200 when requests are answered, 503 while the model is loaded or the server stops."""
        state = "stopping" if service.draining else service.worker.state
        ready = state == "ready"
        return json_response({"status": "ok" if ready else state, "model": service.names[0]}, 200 if ready else 503)

    @app.get("/metrics", tags=["status"], response_class=PlainTextResponse, responses={401: ERRORS[401]})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model(name: str) -> dict[str, Any]:
        created = datetime.fromtimestamp(service.created, UTC)
        return {
            **{"id": name, "object": "model", "created": service.created, "owned_by": "moestream"},  # OpenAI's
            **{"type": "model", "display_name": name, "created_at": created.isoformat()},  # Anthropic's
            "context_window": service.loaded.context,
        }

    @app.get("/v1/models", tags=["OpenAI", "Anthropic"], responses={401: ERRORS[401], 503: ERRORS[503]})
    async def models() -> Response:
        """The model that is served, under each of its names."""
        data = [model(name) for name in service.names]
        paging = {"has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}  # Anthropic's
        return json_response({"object": "list", "data": data, **paging})

    @app.get("/v1/models/{name}", tags=["OpenAI"], responses={c: ERRORS[c] for c in (401, 404, 503)})
    async def one_model(name: str) -> Response:
        """The model that is served."""
        service.check_model(name)
        return json_response(model(name))


def _add_apis(app: FastAPI, service: Service) -> None:
    def add(
        path: str, tag: str, answer: Callable[[Service, Any, Request], Awaitable[Response]], body: type[Body]
    ) -> None:
        async def endpoint(body: Any, request: Request) -> Response:
            return await answer(service, body, request)

        endpoint.__annotations__ = {"body": body, "request": Request, "return": Response}
        endpoint.__doc__ = answer.__doc__
        name = answer.__name__
        streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
        documented = ERRORS | streams if "stream" in body.model_fields else ERRORS
        app.post(path, tags=[tag], name=name, operation_id=name, responses=documented)(endpoint)

    add("/v1/chat/completions", "OpenAI", chat_completions, ChatBody)
    add("/v1/completions", "OpenAI", completions, CompletionBody)
    add("/v1/responses", "OpenAI", responses, ResponsesBody)
    add("/v1/messages", "Anthropic", messages, MessagesBody)
    add("/v1/messages/count_tokens", "Anthropic", count_tokens, CountBody)
