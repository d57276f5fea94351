"""Run the server until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import Callable

import uvicorn

from moestream.errors import ConfigError
from moestream.llm import LLM
from moestream.server.app import create_app
from moestream.server.service import Service
from moestream.server.settings import ServeSettings

CLOSING_SECONDS = 5


class Server(uvicorn.Server):
    """Ends cleanly: what runs may finish for a while, what is left then is told so."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, wait for the old ones, cancel the rest."""
        self._service.draining = True
        hurry = asyncio.get_running_loop().call_later(
            self._service.settings.grace_seconds, self._service.worker.cancel_all
        )
        await super().shutdown(sockets)
        hurry.cancel()


def serve(model: str, settings: ServeSettings, load: Callable[[], LLM], say: Callable[[str], None]) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        model: As the user named it.
        settings: Of the server.
        load: Loads the model; called in the thread that will run it.
        say: Takes lines for the person at the terminal.

    Raises:
        ConfigError: the address cannot be used.
        MoestreamError: the model could not be loaded.
    """
    _log_to_stderr()
    listener = _listen(settings)
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when all is done
        asyncio.run(_serve(model, settings, load, say, listener))


async def _serve(
    model: str, settings: ServeSettings, load: Callable[[], LLM], say: Callable[[str], None], listener: socket.socket
) -> None:
    service = Service(model, settings, load)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.grace_seconds) + CLOSING_SECONDS,
    )
    server = Server(config, service)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def announce() -> None:
        await service.changed.wait()
        if service.worker.state == "ready":
            say(f"{service.names[0]} is ready at {url}/v1 (OpenAI) and {url} (Anthropic, and a web page); Ctrl-C stops")
        else:
            server.should_exit = True

    announced = asyncio.create_task(announce())
    try:
        await server.serve([listener])
    finally:
        announced.cancel()
    if service.worker.error is not None:
        raise service.worker.error


def _listen(settings: ServeSettings) -> socket.socket:
    """Bind at once, so that a port in use is an error before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; see --host, --port"
        ) from error
    return listener


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("moestream", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
