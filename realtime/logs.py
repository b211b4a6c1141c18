"""Structured logs of the long-running commands."""

from __future__ import annotations

import json
import logging
import sys


class JsonLines(logging.Formatter):
    """Structured logs: one JSON object a line. Names of sessions appear, nothing about a person does."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Structured logs on stderr, for `serve` and `gateway`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("scansteer")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
