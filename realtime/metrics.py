"""Counters of the service, as Prometheus text and over an optional loopback HTTP port."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from scansteer.realtime.messages import Decision, Status

_BUCKETS_MS = (10, 25, 50, 100, 250, 500, 1000, 2500)


@dataclass
class Metrics:
    """What has happened since the service started."""

    messages: int = 0
    images: int = 0
    duplicates: int = 0
    unusable: int = 0
    gaps: int = 0
    failures: int = 0
    decisions: int = 0
    stops: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    latency_sum_ms: float = 0.0
    latency_counts: list[int] = field(default_factory=lambda: [0] * len(_BUCKETS_MS))

    def refused(self, code: str) -> None:
        self.refusals[code] += 1

    def decision(self, decision: Decision) -> None:
        self.decisions += 1
        self.stops += decision.action == "stop"
        total = decision.latency_ms.total
        self.latency_sum_ms += total
        for index, bound in enumerate(_BUCKETS_MS):
            self.latency_counts[index] += total <= bound

    def text(self, status: Status) -> str:
        """Prometheus text exposition format 0.0.4."""
        lines: list[str] = []
        for name, value, meaning in (
            ("messages", self.messages, "messages received"),
            ("images", self.images, "images accepted"),
            ("duplicate_images", self.duplicates, "images received again"),
            ("unusable_images", self.unusable, "accepted images that were not used"),
            ("gap_requests", self.gaps, "requests to fill a gap"),
            ("session_failures", self.failures, "sessions that failed"),
            ("decisions", self.decisions, "decisions published"),
            ("stop_decisions", self.stops, "decisions that said stop"),
        ):
            lines += _metric(f"scansteer_{name}_total", "counter", meaning, [("", value)])
        refusals = [(f'{{code="{code}"}}', count) for code, count in sorted(self.refusals.items())]
        lines += _metric("scansteer_refused_total", "counter", "messages refused", refusals)
        lines += self._histogram()
        lines += _metric("scansteer_ready", "gauge", "1 if every open session is compiled", [("", int(status.ready))])
        lines += _metric("scansteer_sessions", "gauge", "sessions held", [("", len(status.sessions))])
        waiting = sum(session.waiting for session in status.sessions)
        lines += _metric("scansteer_waiting_repetitions", "gauge", "accepted, not yet used", [("", waiting)])
        return "\n".join(lines) + "\n"

    def _histogram(self) -> list[str]:
        name = "scansteer_decision_latency_milliseconds"
        samples: list[tuple[str, float]] = [
            (f'_bucket{{le="{bound}"}}', count) for bound, count in zip(_BUCKETS_MS, self.latency_counts, strict=True)
        ]
        samples += [('_bucket{le="+Inf"}', self.decisions), ("_sum", round(self.latency_sum_ms, 3)), ("_count", self.decisions)]
        return _metric(name, "histogram", "from image to decision", samples)


def _metric(name: str, kind: str, meaning: str, samples: Sequence[tuple[str, float]]) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *(f"{name}{suffix} {value}" for suffix, value in samples)]
