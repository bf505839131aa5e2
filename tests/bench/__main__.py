"""`python -m tests.bench [NAME …]`: measure and print the table; exit status 1 when a figure is missed."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.bench import containers, history, http, idle, memory, placements
from tests.bench.table import HEADER, Row

ROWS: dict[str, Callable[[], list[Row]]] = {
    "post": http.posts,
    "get": http.gets,
    "containers": containers.finished,
    "idle": idle.latency,
    "placements": placements.rows,
    "history": history.cost,
    "memory": memory.sizes,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"no such measurement: {', '.join(unknown)}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    print(HEADER, flush=True)
    met = True
    for name in names or ROWS:
        for row in ROWS[name]():
            print(row, flush=True)
            met = met and row.met
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
