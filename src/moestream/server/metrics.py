"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moestream.engine.engine import Engine
from moestream.engine.receipt import Receipt

if TYPE_CHECKING:
    from moestream.server.worker import Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
RATES = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counts of one server; each has a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        """Nothing is counted yet.

        Args:
            worker: Asked for the state of engine and expert store at each scrape.
        """
        own = self.registry = CollectorRegistry()
        self.requests = Counter("moestream_requests", "HTTP requests answered", ["path", "status"], registry=own)
        self.replies = Counter("moestream_replies", "Replies ended", ["reason"], registry=own)
        self.cached = Counter("moestream_cached_tokens", "Of them, in the prefix cache", registry=own)
        self.prompt = Counter("moestream_prompt_tokens", "Prompt tokens of ended replies", registry=own)
        self.generated = Counter("moestream_generated_tokens", "Tokens of ended replies", registry=own)
        self.first = Histogram("moestream_ttft_seconds", "To the first token", buckets=SECONDS, registry=own)
        self.rate = Histogram("moestream_decode_tokens_per_second", "Of a reply", buckets=RATES, registry=own)
        self.registry.register(_Engine(worker))

    def finished(self, receipt: Receipt) -> None:
        """Count a reply."""
        self.replies.labels(receipt.finish_reason).inc()
        self.prompt.inc(receipt.prompt_tokens)
        self.cached.inc(receipt.cached_tokens)
        self.generated.inc(receipt.new_tokens)
        if receipt.ttft_s is not None:
            self.first.observe(receipt.ttft_s)
        if receipt.decode_tok_s is not None:
            self.rate.observe(receipt.decode_tok_s)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Engine(Collector):
    """State of the engine and counters of the expert store, read when asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """Every value now."""
        worker = self._worker
        yield GaugeMetricFamily("moestream_ready", "1 when the model is loaded", value=worker.state == "ready")
        running, waiting = worker.load
        yield GaugeMetricFamily("moestream_running", "Sequences in the batch", value=running)
        yield GaugeMetricFamily("moestream_waiting", "Sequences that wait for a place", value=waiting)
        if worker.state != "ready" or worker.llm is None:
            return
        yield from self._states(worker.llm.runtime.engine)
        stats = worker.llm.runtime.store.stats()
        read = CounterMetricFamily("moestream_read_bytes", "Expert bytes delivered", labels=["source"])
        read.add_metric(["disk"], stats.bytes_read)
        read.add_metric(["page_cache"], stats.bytes_cached)
        yield read
        asked = CounterMetricFamily("moestream_experts", "Experts a layer asked for", labels=["tier"])
        asked.add_metric(["host"], stats.hits)
        asked.add_metric(["ahead"], stats.hits_ahead)
        asked.add_metric(["disk"], stats.misses)
        yield asked
        ahead = CounterMetricFamily("moestream_ahead_bytes", "Expert bytes read before the router", labels=["use"])
        ahead.add_metric(["used"], stats.bytes_ahead)
        ahead.add_metric(["wasted"], stats.bytes_wasted)
        yield ahead
        yield CounterMetricFamily("moestream_failed_reads", "Experts whose read failed for good", value=stats.failed)
        yield CounterMetricFamily("moestream_disk_busy_seconds", "With a read under way", value=stats.busy_seconds)
        yield CounterMetricFamily("moestream_stall_seconds", "Waiting for reads", value=stats.stall_seconds)
        yield GaugeMetricFamily("moestream_hit_rate", "Share of experts found in memory", value=stats.hit_rate)
        yield GaugeMetricFamily("moestream_io_overlap", "Share of reading hidden behind work", value=stats.overlap)

    def _states(self, engine: Engine) -> Iterator[Metric]:
        """Memory of sequences and prefixes."""
        held = GaugeMetricFamily("moestream_state_bytes", "Reserved for sequences, and kept of prefixes", labels=["of"])
        held.add_metric(["sequences"], engine.states_reserved)
        held.add_metric(["prefixes"], engine.prefixes_held)
        yield held
        yield CounterMetricFamily("moestream_preemptions", "Sequences that had to read again", value=engine.preemptions)
