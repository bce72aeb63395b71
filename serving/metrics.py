"""What the server tells Prometheus, and its structured log: one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_log = logging.getLogger("visionloop.serving")


class Metrics:
    """Every figure of one server; a registry of its own, so tests and several servers do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by protocol and status.", "model", "protocol", "code")
        self.pictures = self._counter("pictures", "Pictures by outcome.", "model", "outcome")
        self.profiles_ignored = self._counter(
            "profiles_ignored", "Answered pictures whose colour profile is of no use.", "model"
        )
        self.shed = self._counter("shed", "Requests refused because the server was full.", "model", "protocol")
        self.seconds = self._histogram("request_seconds", "From the last byte of a request to its answer.", "model")
        self.queue_seconds = self._histogram("queue_seconds", "Waiting for a lane of the engine.", "model")
        self.decode_seconds = self._counter("decode_seconds", "Time spent decoding.", "model")
        self.infer_seconds = self._counter("infer_seconds", "Time spent in the engine.", "model")
        self.batch_size = self._histogram("batch_size", "Pictures of a batch.", "model", buckets=(1, 2, 4, 8, 16, 32, 64))
        self.queued = self._gauge("queued_pictures", "Pictures that wait.", "model")
        self.generation = self._gauge("generation", "Ledger row of the routes that are served.", "model")
        self.switches = self._counter("switches", "Releases that took over.", "model")
        self.load_failures = self._counter("load_failures", "Releases that were refused or did not load.", "model")
        self.worker_restarts = self._counter("worker_restarts", "Engine processes that died and were replaced.", "model")
        self.blocked = self._counter("blocked_pictures", "Pictures refused because they killed an engine twice.", "model")
        self.journal_rows = self._counter("journal_rows", "Predictions written to the journal.")
        self.journal_lost = self._counter("journal_lost_rows", "Predictions that no journal holds.", "reason")
        self.journal_late = self._counter("journal_late_rows", "Predictions answered before they were in the journal.")
        self.journal_backlog = self._gauge("journal_backlog_rows", "Predictions waiting to be written.")
        self.captured = self._counter("captured_images", "Images kept by opt-in.")
        self.captures_waiting = self._gauge("waiting_image_bytes", "Bytes of kept images that wait to be sent.")
        self.not_captured = self._counter("missed_images", "Images of the sample that could not be kept.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"visionloop_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"visionloop_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"visionloop_{name}", text, labels, registry=self.registry, buckets=buckets)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        facts |= getattr(record, "facts", {})
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        return json.dumps(facts, default=str)


def log(event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """One line of the structured log."""
    _log.log(level, event, extra={"facts": facts})


def log_to_stderr() -> None:
    """Send the structured log, and what the HTTP server has to say, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("visionloop.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    _log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
