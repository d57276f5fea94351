"""``moestream serve``: OpenAI's and Anthropic's APIs over one model."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from moestream.cli import options
from moestream.cli.output import Bar, byte_amount, note
from moestream.errors import ConfigError

SERVER = "Server"
PREFIX = "MOESTREAM"
"""Every flag is also an environment variable: ``--max-batch`` is ``MOESTREAM_MAX_BATCH``."""


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults from a TOML file; flags and environment variables go before them."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    defaults: dict[str, Any] = {}
    keys = {_key(parameter): parameter.name for parameter in context.command.params}
    for key, value in values.items():
        name = keys.get(key.replace("_", "-"))
        if name is None or key == "config":
            raise ConfigError(f"{path}: unknown key {key!r}; known: {', '.join(sorted(keys))}")
        if isinstance(value, dict):
            raise ConfigError(f"{path}: {key} must be a plain value, not a table")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _key(parameter: Any) -> str:
    """A parameter as the file names it: its flag, or its name for the argument."""
    flags = [flag[2:] for flag in parameter.opts if flag.startswith("--")]
    return flags[0] if flags else str(parameter.name)


Model = Annotated[
    str,
    typer.Argument(help="A model folder, or 'demo' for the model in this package.", envvar=f"{PREFIX}_MODEL"),
]
Host = Annotated[str, typer.Option(help="Address to listen on; a public one needs a key.", rich_help_panel=SERVER)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=SERVER)]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Refuse requests without it. Better given as an environment variable: flags are visible to others.",
        rich_help_panel=SERVER,
    ),
]
Queue = Annotated[
    int, typer.Option(min=0, help="Requests that may wait; more are answered 429.", rich_help_panel=SERVER)
]
Name = Annotated[
    list[str] | None,
    typer.Option(help="Name of the model in requests; may be repeated. Default: the folder's.", rich_help_panel=SERVER),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(help="A name this server is reached by, besides localhost and addresses.", rich_help_panel=SERVER),
]
AllowedOrigin = Annotated[
    list[str] | None,
    typer.Option(help="A web page that may call, e.g. https://chat.example.org.", rich_help_panel=SERVER),
]
MaxBody = Annotated[
    int | None,
    typer.Option(
        parser=options.size,
        metavar="SIZE",
        help="Largest request.",
        show_default="32MiB",
        rich_help_panel=SERVER,
    ),
]
MaxChoices = Annotated[int, typer.Option(min=1, help="Replies one request may ask for (n).", rich_help_panel=SERVER)]
Ping = Annotated[
    float, typer.Option(help="Seconds of silence after which a stream gets a sign of life.", rich_help_panel=SERVER)
]
Grace = Annotated[
    float, typer.Option(help="Seconds that requests may go on after Ctrl-C or SIGTERM.", rich_help_panel=SERVER)
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens a reply has at most, whatever it asks for. Default: the context.", rich_help_panel=SERVER
    ),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", help="A request that takes longer is answered 504. Default: none.", rich_help_panel=SERVER
    ),
]
AllowPriority = Annotated[
    bool,
    typer.Option(
        "--allow-priority",
        help="Let requests go before others by a priority below 0; above 0, after others, any may ask for.",
        rich_help_panel=SERVER,
    ),
]
MaxDecodeStall = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="MS",
        help="How long a prompt may keep replies under way waiting for their next token; 0: until its chunk is read.",
        rich_help_panel=SERVER,
    ),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Requests decoded together. Default: up to 8.", rich_help_panel=options.MODEL),
]
Config = Annotated[
    Path | None,
    typer.Option(
        callback=read_config,
        is_eager=True,
        help="TOML file of flags without their dashes, e.g. max-batch = 4.",
        rich_help_panel=SERVER,
    ),
]


def serve(
    model: Model = "demo",
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: ApiKey = None,
    queue: Queue = 64,
    name: Name = None,
    allowed_host: AllowedHost = None,
    allowed_origin: AllowedOrigin = None,
    max_body: MaxBody = None,
    max_choices: MaxChoices = 8,
    ping: Ping = 10.0,
    grace: Grace = 20.0,
    max_tokens: MaxTokens = None,
    request_timeout: RequestTimeout = None,
    allow_priority: AllowPriority = False,
    max_decode_stall: MaxDecodeStall = 500,
    ram: options.Ram = None,
    max_batch: MaxBatch = None,
    context: options.Context = None,
    threads: options.Threads = None,
    cache: options.Cache = None,
    prefetch: options.Prefetch = "auto",
    active_experts: options.ActiveExperts = None,
    exact: options.Exact = False,
    prefill_chunk: options.PrefillChunk = None,
    prefix_cache: options.PrefixCache = None,
    prefix_disk: options.PrefixDisk = 0,
    stored_plan: options.StoredPlan = True,
    config: Config = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's and Anthropic's APIs.

    A flag goes before its environment variable (MOESTREAM_PORT for --port), and that before the file of --config.
    """
    from moestream.llm import LLM  # noqa: PLC0415
    from moestream.server.run import serve as run_server  # noqa: PLC0415
    from moestream.server.settings import DEFAULT_MAX_BODY, ServeSettings  # noqa: PLC0415

    settings = ServeSettings(
        host=host,
        port=port,
        api_key=api_key,
        queue=queue,
        max_body=max_body or DEFAULT_MAX_BODY,
        max_choices=max_choices,
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        names=tuple(name or ()),
        ping_seconds=ping,
        grace_seconds=grace,
        max_tokens=max_tokens,
        request_timeout=request_timeout,
        allow_priority=allow_priority,
    )

    def load() -> LLM:
        with Bar(byte_amount) as bar:
            bar.update(f"Loading {model}")
            return LLM.load(
                model,
                ram=ram,
                threads=threads,
                cache=cache,
                prefetch=prefetch,
                active_experts=active_experts,
                exact=exact,
                context=context,
                prefill_chunk=prefill_chunk,
                prefix_cache=prefix_cache,
                prefix_disk=prefix_disk,
                stored_plan=stored_plan,
                max_decode_stall=max_decode_stall or None,
                max_batch=max_batch,
                progress=lambda _what, done, total: bar.update(f"Loading {model}", done, total),
            )

    run_server(model, settings, load, note)
