"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from moestream.config import CacheMode, parse_size
from moestream.errors import ConfigError


def size(text: str) -> int:
    """The value of a flag that takes bytes."""
    try:
        return parse_size(text, "size")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def size_or_none(text: str) -> int:
    """The value of a flag that takes bytes, where 0 turns something off."""
    return 0 if str(text).strip() == "0" else size(text)


MODEL = "Model"
SAMPLING = "Sampling"

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A model folder, or 'demo' for the model in this package.", rich_help_panel=MODEL
    ),
]
Ram = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Memory for the whole process, e.g. 8GB. Default: from free memory and the cgroup limit.",
        rich_help_panel=MODEL,
    ),
]
PrefixCache = Annotated[
    int | None,
    typer.Option(
        parser=size_or_none,
        metavar="SIZE",
        help="Memory, part of --ram, for what prompts begin with, so that it is read once. Default: a sixteenth of it.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
PrefixDisk = Annotated[
    int,
    typer.Option(
        parser=size_or_none,
        metavar="SIZE",
        help="Disk space for the same between runs. Prompts and replies can be read from these files. Default: none.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Compute threads. Default: from affinity and the cgroup quota.", rich_help_panel=MODEL),
]
Cache = Annotated[
    CacheMode | None,
    typer.Option(
        help="arena: direct reads into an LFRU cache. page: buffered reads, trust the OS. hybrid: an LFRU cache over "
        "buffered reads. none: keep nothing. Default: as `moestream plan --measure` found, else arena.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
StoredPlan = Annotated[
    bool,
    typer.Option(
        "--stored-plan/--no-stored-plan",
        help="Without --ram and --cache, follow what `moestream plan --measure` found.",
        rich_help_panel=MODEL,
    ),
]
Prefetch = Annotated[
    Literal["auto", "off"],
    typer.Option(
        help="auto: read experts before their router has chosen them, as long as that is measured to pay.",
        rich_help_panel=MODEL,
    ),
]
ActiveExperts = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="K", help="Use K experts a token, fewer than the model's own (lossy).", rich_help_panel=MODEL
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Float32 activations and KV cache: slower, reproducible.", rich_help_panel=MODEL)
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens of prompt and reply. Default: the model's limit, at most 8192.", rich_help_panel=MODEL
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Prompt tokens of one sweep over the layers. Default: 512, up to 4096 where experts are streamed and "
        "there is memory for it.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="New tokens at most.", rich_help_panel=SAMPLING, show_default="512")
]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. Default: the model's own.", rich_help_panel=SAMPLING)
]
TopK = Annotated[int | None, typer.Option(help="Keep the K likeliest tokens; 0 keeps all.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None, typer.Option(help="Keep the likeliest tokens up to this probability.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens below this fraction of the likeliest.", rich_help_panel=SAMPLING)
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: avoid tokens already seen.", rich_help_panel=SAMPLING)
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtracted from logits of tokens in the reply.", rich_help_panel=SAMPLING)
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtracted once per occurrence.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the reply; may be repeated.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same text.", rich_help_panel=SAMPLING)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def given(**values: Any) -> dict[str, Any]:
    """The flags that were given; those left out stay the library's or the model's own."""
    return {name: value for name, value in values.items() if value is not None}
