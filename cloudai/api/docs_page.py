"""`/docs`: the API's reference as a page, rendered in the browser from `/openapi.json`; nothing comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response

from cloudai.api.routing import Request


@cache
def page() -> tuple[str, str]:
    """The page and the Content-Security-Policy that lets exactly its own script and style run."""
    html = files("cloudai.api").joinpath("docs.html").read_text(encoding="utf-8")
    script, style = (_hash(html, tag) for tag in ("script", "style"))
    policy = f"default-src 'none'; connect-src 'self'; script-src {script}; style-src {style}; frame-ancestors 'none'"
    return html, policy


def _hash(html: str, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert found, tag
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


async def serve(_: Request) -> Response:
    html, policy = page()
    return Response(html, media_type="text/html", headers={"content-security-policy": policy})
