"""Prometheus metrics of one app, in a registry of its own. Names are vLLM's with `octavo:` in front.

Gauges and engine counters are read from the backend when scraped; histograms are fed by what requests return. A
histogram costs a bisection per value: one value comes per streamed token.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.core.request import Stats
from octavo.frontend.outputs import RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from octavo.server.backend import Backend

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
_REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 30, 60, 120, 480, 1920)


class Histogram:
    """Counts of values at most each of `bounds`, and their sum."""

    def __init__(self, name: str, doc: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.doc = doc
        self.bounds = tuple(map(float, bounds))
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        bounds = [*map(str, self.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(map(float, self.counts)), strict=True))
        family = HistogramMetricFamily(self.name, self.doc, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self.sum)
        return family


class Metrics(Collector):
    """All series of an app, labelled with the model's name."""

    def __init__(self, backend: Backend, model_name: str) -> None:
        self._backend = backend
        self._labels = {"model_name": model_name}
        self.first_token = Histogram(
            "octavo:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_SECONDS
        )
        self.inter_token = Histogram("octavo:inter_token_latency_seconds", "Between tokens.", _TOKEN_SECONDS)
        self.queue = Histogram("octavo:request_queue_time_seconds", "Waiting to be scheduled.", _REQUEST_SECONDS)
        self.prefill = Histogram(
            "octavo:request_prefill_time_seconds", "From scheduled to the first token.", _REQUEST_SECONDS
        )
        self.decode = Histogram(
            "octavo:request_decode_time_seconds", "From the first token to the last.", _REQUEST_SECONDS
        )
        self.total = Histogram("octavo:e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_SECONDS)
        self.finished: Counter[str] = Counter()
        """Finished sequences by reason."""
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def timer(self) -> Timer:
        return Timer(self)

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        stats = self._backend.stats
        for name, doc, number in _gauges(stats):
            gauge = GaugeMetricFamily(name, doc, labels=names)
            gauge.add_metric(values, number)
            yield gauge
        for name, doc, number in _counters(stats):
            counter = CounterMetricFamily(name, doc, labels=names)
            counter.add_metric(values, number)
            yield counter
        finished = CounterMetricFamily(
            "octavo:request_success", "Finished sequences by reason.", labels=[*names, "finished_reason"]
        )
        for reason, count in self.finished.items():
            finished.add_metric([*values, reason], count)
        yield finished
        for histogram in (self.first_token, self.inter_token, self.queue, self.prefill, self.decode, self.total):
            yield histogram.family(self._labels)


def _gauges(stats: Stats) -> tuple[tuple[str, str, float], ...]:
    used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    return (
        ("octavo:num_requests_running", "Sequences being computed.", stats.running),
        ("octavo:num_requests_waiting", "Sequences waiting to be computed.", stats.waiting),
        ("octavo:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", used),
    )


def _counters(stats: Stats) -> tuple[tuple[str, str, int], ...]:
    return (
        ("octavo:prompt_tokens", "Prompt tokens computed or found in the prefix cache.", stats.prompt_tokens),
        ("octavo:generation_tokens", "Tokens generated.", stats.generated_tokens),
        ("octavo:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
        ("octavo:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ("octavo:num_preemptions", "Sequences preempted.", stats.preemptions),
    )


class Timer:
    """Feeds the histograms from the outputs of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last: dict[int, float] = {}

    def observe(self, output: RequestOutput) -> None:
        metrics, now = self._metrics, time.perf_counter()
        for choice in output.outputs:
            if choice.token_ids:
                last = self._last.get(choice.index)
                if last is not None:
                    metrics.inter_token.observe((now - last) / len(choice.token_ids), len(choice.token_ids))
                self._last[choice.index] = now
            if choice.finish_reason is not None:
                metrics.finished[choice.finish_reason] += 1
        if output.finished and output.metrics is not None:
            self._finish(output, output.metrics)

    def _finish(self, output: RequestOutput, moments: RequestMetrics) -> None:
        """Outputs that came whole have shown no time between tokens: theirs is the mean."""
        metrics, tokens = self._metrics, moments.num_generation_tokens
        if not moments.first_token_time:
            return
        metrics.first_token.observe(moments.first_token_latency)
        metrics.queue.observe(max(0.0, moments.scheduled_time - moments.arrival_time))
        metrics.prefill.observe(max(0.0, moments.first_token_time - moments.scheduled_time))
        decode = max(0.0, moments.last_token_time - moments.first_token_time)
        metrics.decode.observe(decode)
        metrics.total.observe(max(0.0, moments.last_token_time - moments.arrival_time))
        steps = tokens // len(output.outputs) - 1 if output.outputs else 0
        if steps > 0 and sum(len(choice.token_ids) for choice in output.outputs) == tokens:
            metrics.inter_token.observe(decode / steps, tokens - len(output.outputs))
