"""The agent's metrics, served at /metrics of its own endpoint."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

CONNECTED = Gauge("cloudai_agent_connected", "1 while the agent is connected to the server.")
CONTAINERS = Gauge("cloudai_agent_containers_running", "Containers of CloudAI running on this worker.")
STARTED = Counter("cloudai_agent_containers_started", "Containers started.")
