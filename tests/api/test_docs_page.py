"""The page at /docs in a real browser."""

from __future__ import annotations

import asyncio
import html
import shutil
from pathlib import Path

from cloudai.api.openapi import document
from tests.api.conftest import Server
from tests.engines import missing

# A new profile, and nothing that asks the internet.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--virtual-time-budget=20000")  # fmt: skip


async def test_the_page_shows_every_operation(server: Server, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        missing("A browser", "apt-get install chromium, or run scripts/provision as root")
    url = f"http://127.0.0.1:{server.port}/docs"
    process = await asyncio.create_subprocess_exec(
        browser, *FLAGS, f"--user-data-dir={tmp_path}", "--dump-dom", url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    text = html.unescape((await process.communicate())[0].decode())
    assert "Loading" not in text
    for path, operations in document()["paths"].items():
        assert path in text
        for operation in operations.values():
            assert operation["summary"] in text
