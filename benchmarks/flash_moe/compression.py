"""Claim: LZ4-compressed experts lose 13 %.

Compresses the experts of a checkpoint one by one (default: the trained model inside the package, whose bytes are
real) with LZ4 and zstd, and weighs what a smaller read saves against what unpacking costs: a read of b bytes takes
b / disk, a compressed one max(b * ratio / disk, unpacking) where the two overlap perfectly, their sum where not.

Needs ``pip install lz4 zstandard``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import common

from moestream.checkpoint.find import DEMO, find_model
from moestream.checkpoint.index import Checkpoint, open_checkpoint
from moestream.checkpoint.safetensors import pread_exact
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights
from moestream.system import cpu_count

Codec = tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]


def make_codecs() -> dict[str, Codec]:
    """Packing and unpacking by name.

    Raises:
        SystemExit: a package is missing.
    """
    try:
        import lz4.block  # noqa: PLC0415 - wanted by this script only
        import zstandard  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit(f"{error}: pip install lz4 zstandard") from error

    def lz4_unpack(packed: bytes, _: int) -> bytes:
        return bytes(lz4.block.decompress(packed))

    def zstd_unpack(packed: bytes, size: int) -> bytes:
        return zstandard.ZstdDecompressor().decompress(packed, size)

    return {
        "lz4": (lz4.block.compress, lz4_unpack),
        "lz4hc": (lambda raw: lz4.block.compress(raw, "high_compression"), lz4_unpack),
        "zstd 3": (lambda raw: zstandard.ZstdCompressor(3).compress(raw), zstd_unpack),
        "zstd 19": (lambda raw: zstandard.ZstdCompressor(19).compress(raw), zstd_unpack),
    }


def expert_bytes(checkpoint: Checkpoint, layers: int) -> list[list[bytes]]:
    """The parts of every expert of the first ``layers`` layers."""
    config, names = parse_config(checkpoint.config)
    experts = []
    for _, table in sorted(map_weights(checkpoint, config, names).experts.items())[:layers]:
        for ranges in table.ranges.tolist():
            experts.append([bytes(pread_exact(checkpoint.files[file], at, size)) for file, at, size in ranges])
    return experts


def speedup(ratio: float, unpack: float, disk: float, overlapped: bool) -> float:
    """How much faster compressed bytes arrive.

    Args:
        ratio: compressed / raw bytes.
        unpack: raw bytes per second that come out of the codec with every core.
        disk: bytes per second of the disk.
        overlapped: reading and unpacking at the same time, else one after the other.
    """
    read, work = ratio / disk, 1 / unpack
    return (1 / disk) / (max(read, work) if overlapped else read + work)


def unpack_rate(packed: list[bytes], sizes: list[int], unpack: Callable[[bytes, int], bytes], threads: int) -> float:
    """Raw bytes per second with ``threads`` threads (both codecs leave the GIL)."""
    total = sum(sizes)
    passes = max(1, int(2e8 / total))

    def work(number: int) -> None:
        for _ in range(passes):
            for one, size in zip(packed[number::threads], sizes[number::threads], strict=True):
                unpack(one, size)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    start = perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return passes * total / (perf_counter() - start)


def main() -> None:
    """Ratios of whole experts and of their codes alone, rates, and what it would do to reading."""
    parser = common.arguments(__doc__, 3)
    parser.add_argument("--model", default=DEMO, help="checkpoint whose experts are packed (default: the one inside)")
    parser.add_argument("--layers", type=int, default=12, help="layers to take experts from (default %(default)s)")
    parser.add_argument(
        "--together", type=int, default=40, help="experts packed as one piece (default %(default)s: 4 MB)"
    )
    parser.add_argument("--disk", type=Path, help="folder with a large file, for the rate of the disk")
    args = parser.parse_args()
    codecs = make_codecs()
    experts = expert_bytes(open_checkpoint(find_model(args.model)), args.layers)
    groups = [experts[i : i + args.together] for i in range(0, len(experts), args.together)]
    pieces = [b"".join(part for expert in group for part in expert) for group in groups]
    kinds = {
        "codes": [b"".join(p for expert in group for p in expert[0::3]) for group in groups],
        "scales and biases": [
            b"".join(p for expert in group for i, p in enumerate(expert) if i % 3) for group in groups
        ],
    }
    sizes = [len(piece) for piece in pieces]
    disk = common.disk_rate(common.largest_file(args.disk)) / common.GB if args.disk else 0.0
    cores = cpu_count()
    print(f"{len(experts)} experts of {sum(map(len, experts[0]))} bytes in pieces of {max(sizes)}; {cores} threads")
    print(f"ceiling: disk {disk:.2f} GB/s" if args.disk else "no --disk given: ratios and rates only")
    packed = {name: [pack(piece) for piece in pieces] for name, (pack, _) in codecs.items()}
    rates = common.interleave(
        {
            name: lambda name=name: unpack_rate(packed[name], sizes, codecs[name][1], cores) / common.GB
            for name in codecs
        },
        args.rounds,
    )
    facts: dict[str, dict[str, float]] = {}
    for name, (pack, _) in codecs.items():
        rate = common.medians(rates)[name]
        fact = {"ratio": sum(map(len, packed[name])) / sum(sizes), "unpack_GB_s": rate}
        fact |= {kind: sum(len(pack(p)) for p in parts) / sum(map(len, parts)) for kind, parts in kinds.items()}
        line = f"  {name:8} {100 * fact['ratio']:.1f} % of the bytes (codes {100 * fact['codes']:.1f},"
        line += f" scales and biases {100 * fact['scales and biases']:.1f}), unpacks {rate:.2f} GB/s"
        if disk:
            fact |= {k: speedup(fact["ratio"], rate, disk, k == "overlapped") for k in ("overlapped", "in turn")}
            line += f"; reading becomes {fact['overlapped']:.2f}x as fast overlapped, {fact['in turn']:.2f}x in turn"
        print(line)
        facts[name] = fact
    common.report("LZ4 experts -13 %", {"disk_GB_s": disk, "codecs": facts})


if __name__ == "__main__":
    main()
