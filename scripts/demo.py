"""`make demo`: CloudAI on this machine from nothing to finished tasks in under a minute, leaving nothing behind.

Each command is shown as a person would type it, then its output; the exit status is not 0 if anything is not as it should be.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from scripts.demo_image import demo_image

PATIENCE = 60
CLOUDAI = [sys.executable, "-m", "cloudai"]


class NotAsExpected(Exception):
    """The demo found CloudAI wanting; the message says where."""


def say(text: str) -> None:
    click.secho(f"\n# {text}", bold=True)


class Demo:
    """Commands against the CloudAI that the demo started."""

    def __init__(self, url: str, image: str) -> None:
        self.image = image
        self.environment = clean_environment() | {"CLOUDAI_SERVER": url}

    def cloudai(self, *arguments: str, status: int = 0, contains: str = "", show: bool = True) -> str:
        """The output of a command, shown as it comes; its exit status must be `status` and its output contain `contains`."""
        if show:
            click.echo("$ cloudai " + " ".join(quoted(word) for word in arguments))
        process = subprocess.Popen([*CLOUDAI, *arguments], env=self.environment, text=True, stdout=subprocess.PIPE)
        lines = []
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if show:
                click.echo("  " + line, nl=False)
        output = "".join(lines)
        if process.wait(PATIENCE) != status:
            raise NotAsExpected(f"exit status {process.returncode} instead of {status}")
        if contains not in output:
            raise NotAsExpected(f"{contains!r} is missing in the output")
        return output

    def submit(self, command: str, *options: str) -> str:
        return self.cloudai("submit", "-i", self.image, *options, "--", command).strip()

    def task(self, task_id: str) -> dict[str, Any]:
        return dict(json.loads(self.cloudai("get", "--json", task_id, show=False)))

    def expect(self, task_id: str, **fields: Any) -> None:
        task = self.task(task_id)
        for name, value in fields.items():
            if task[name] != value:
                raise NotAsExpected(f"{name} of {task_id} is {task[name]!r} instead of {value!r}")


def story(demo: Demo) -> None:
    small = ("--cpu", "0.5", "--memory", "0.125")
    say("A task: run it, see its output, get its exit status")
    demo.cloudai(
        "submit", "--wait", "-i", demo.image, *small, "--", "echo hello from $(hostname)", contains="hello from"
    )

    say("A task that fails: its exit status comes back")
    demo.cloudai("submit", "--wait", "-i", demo.image, *small, "--", "echo this one fails; exit 3", status=3)

    say("Logs, followed while the task runs")
    counting = demo.submit("for i in 1 2 3; do echo step $i; sleep 1; done", *small)
    demo.cloudai("logs", "-f", counting, contains="step 3")
    demo.expect(counting, status="completed", exit_code=0)

    say("A task that is cancelled: `cancelled` once its container is gone")
    endless = demo.submit("while true; do sleep 1; done", *small)
    demo.cloudai("cancel", endless, contains="cancel")
    demo.cloudai("wait", endless, status=125, contains="cancelled")

    say("A task larger than this machine waits, and says why")
    large = demo.submit("echo never", "--cpu", "500")
    demo.cloudai("get", large, contains="TooLargeForEveryWorker")
    demo.cloudai("ps", contains=large)
    demo.cloudai("cancel", large)
    demo.expect(large, status="cancelled")

    say("All of them, and the machine")
    demo.cloudai("ps", "-a", contains="completed")
    demo.cloudai("workers", contains="active")
    demo.cloudai("status", contains="Tasks")


@contextlib.contextmanager
def running(directory: Path, runtime: str) -> Iterator[str]:
    """`cloudai up` on a free port; gives its URL and stops it at the end, which must go well."""
    arguments = ["up", "--port", "0", "--health-port", "0", "--runtime", runtime, "--log-level", "warning"]
    click.echo("$ cloudai " + " ".join(arguments))
    process = subprocess.Popen(
        [*CLOUDAI, *arguments, "--data-dir", str(directory / "data")],
        env=clean_environment(),
        cwd=directory,
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout
        url = None
        for line in process.stdout:
            if not line.startswith(("  First ", "  Try ", "   ")):  # what to type, for somebody whose server stays
                click.echo("  " + line, nl=False)
            if found := re.search(r"API +(http://\S+)", line):
                url = found[1]
            if "Ctrl-C" in line:
                break
        if url is None:
            raise NotAsExpected(f"`cloudai up` ended with status {process.wait(PATIENCE)}")
        yield url
    finally:
        say("Stop")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
        click.echo("".join(f"  {line}\n" for line in output.splitlines()), nl=False)
    if process.returncode != 0:
        raise NotAsExpected(f"`cloudai up` ended with status {process.returncode}")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CLOUDAI_")}


def quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else f"'{word}'"


def main() -> int:
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="cloudai-demo-") as name, demo_image() as (image, why):
            say(why)
            runtime = "docker" if image else "process"
            with running(Path(name), runtime) as url:
                story(Demo(url, image or "busybox"))
    except NotAsExpected as error:
        click.secho(f"\nThe demo failed: {error}", fg="red", err=True)
        return 1
    click.secho(
        f"\nAll as it should be, in {time.monotonic() - began:.0f} s. `make up` starts CloudAI for you.", bold=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
