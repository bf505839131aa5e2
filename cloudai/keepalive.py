"""What to set on a socket on which nothing may be said for long: nothing else tells that the other end's machine is gone."""

from __future__ import annotations

import socket

# Seconds after which a silent connection is tried, then how often, and how often in vain.
SILENT, BETWEEN, IN_VAIN = 60, 10, 3
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, BETWEEN),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, IN_VAIN),
)
