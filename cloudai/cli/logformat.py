"""What the server parts write to standard error: readable lines, or one JSON object a line for a log collector."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from cloudai.settings import Settings

# Libraries that tell of each request or poll at "info".
_CHATTY = (
    "httpx",
    "httpcore",
    "uvicorn",
    "uvicorn.error",
    "uvicorn.access",
    "websockets",
    "docker",
    "urllib3",
    "alembic",
)


# uvicorn says these of a handshake that was answered with an HTTP error, too, and of a followed log that is broken off
# because the API stops. Nothing else of ours ends so.
_ANSWERED = tuple(f"ASGI callable returned without completing {what}." for what in ("handshake", "response"))
_USUAL = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "message"}`, with what else the record was given (`extra=`) and `error` for a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {name: value for name, value in record.__dict__.items() if name not in _USUAL}
        line |= {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.getMessage() not in _ANSWERED)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
