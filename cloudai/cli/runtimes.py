"""Which runtime a worker uses, and why. The library of the other one is not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloudai.cli.place import StartRefused
from cloudai.settings import Settings
from cloudai_agent.runtime import EngineDown, Runtime

NO_ISOLATION = "tasks run as plain processes of this user: images are ignored and nothing is isolated"


@dataclass(frozen=True, slots=True)
class Choice:
    """`warning` is None where there is nothing to warn of."""

    runtime: Runtime
    why: str
    warning: str | None = None

    def __str__(self) -> str:
        return f"{self.runtime.kind}: {self.why}" + (f" (WARNING: {self.warning})" if self.warning else "")


def choose(settings: Settings, directory: Path, worker_id: str) -> Choice:
    """The runtime asked for; with `auto`, the one this worker used before, else Docker if an engine answers.

    A worker keeps its runtime: were it to change while tasks of the other one still run, they would be started again
    beside themselves. Raises StartRefused where the engine that is needed does not answer.
    """
    note = directory / f"{worker_id}.runtime"
    before = note.read_text().strip() if settings.runtime == "auto" and note.exists() else ""
    if settings.runtime == "process":
        choice = _process(settings, "asked for")
    elif before == "process":
        choice = _process(settings, "as before; --runtime docker changes it")
    else:
        choice = _docker(settings, known=before == "docker")
    note.write_text(choice.runtime.kind + "\n")
    return choice


def _docker(settings: Settings, *, known: bool) -> Choice:
    from cloudai_agent.docker import DockerRuntime

    runtime = DockerRuntime(settings)
    try:
        runtime.ping()
    except EngineDown as error:
        runtime.close()
        if known:
            raise StartRefused(
                f"{error}. This worker has used Docker before and its containers may still run: start the engine, "
                "or give up on them with --runtime process"
            ) from None
        if settings.runtime == "docker":
            raise StartRefused(
                f"{error}. Start the engine, or use --runtime process to try CloudAI without one"
            ) from None
        return _process(settings, f"no Docker engine answers: {error}")
    return Choice(runtime, "the Docker engine answers")


def _process(settings: Settings, why: str) -> Choice:
    from cloudai_agent.process import ProcessRuntime

    return Choice(ProcessRuntime(settings), why, NO_ISOLATION)
