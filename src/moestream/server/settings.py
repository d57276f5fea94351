"""What a server is started with. Built once, checked at once, never changed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from moestream.errors import ConfigError

MAX_STOP = 16
"""Stop strings of a request."""
MAX_STOP_LENGTH = 512
MAX_TOOLS = 256
MAX_SCHEMA_DEPTH = 32
"""Nested objects and lists of a JSON schema."""
MAX_SCHEMA_BYTES = 256 << 10
DEFAULT_MAX_BODY = 32 << 20
LOCAL_NAMES = frozenset({"localhost", "localhost.localdomain"})


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Settings of the HTTP side; how the model runs is ``RunConfig``'s.

    Raises:
        ConfigError: a value is out of range, or the address is public and there is no key.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    queue: int = 64
    """Requests that may wait for a place in the batch; more are answered 429."""
    max_body: int = DEFAULT_MAX_BODY
    """Bytes of a request."""
    max_choices: int = 8
    """Replies that one request may ask for (``n`` times prompts)."""
    max_tokens: int | None = None
    """Tokens a reply has at most, whatever it asks for; None: what the context holds."""
    request_timeout: float | None = None
    """Seconds from a place in the queue to the end, after which a request is answered 504; None: no limit."""
    allow_priority: bool = False
    """Requests may ask to go before others; that they can wait they may always say."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides localhost and addresses that ``Host`` may hold."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of other servers that may call this one, such as ``https://chat.example.org``."""
    names: tuple[str, ...] = ()
    """Names of the model that requests may use; the first is shown. Empty: the folder's."""
    ping_seconds: float = 10.0
    """A stream in which nothing happens that long gets a sign of life."""
    grace_seconds: float = 20.0
    """After a signal to stop, requests may go on that long."""

    def __post_init__(self) -> None:
        """Reject what could only fail later."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii()):
            raise ConfigError("api-key must be at least 8 ASCII characters")
        if not self.local and self.api_key is None:
            raise ConfigError(
                f"host {self.host} can be reached from other machines: set a key with --api-key or MOESTREAM_API_KEY, "
                "or leave --host at 127.0.0.1"
            )
        for name, low in (("queue", 0), ("max_body", 1024), ("max_choices", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max-tokens must be at least 1, got {self.max_tokens}")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(f"request-timeout must be above 0, got {self.request_timeout}")
        for name in ("ping_seconds", "grace_seconds"):
            if not 0 < getattr(self, name) <= 3600:
                raise ConfigError(f"{name.replace('_', '-')} must be above 0 and at most 3600")
        for origin in self.allowed_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(
                    f"allowed-origin {origin!r} is not an origin; write for example https://chat.example.org"
                )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() in LOCAL_NAMES
