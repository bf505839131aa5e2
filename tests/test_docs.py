"""What is documented exists, and what exists is documented."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cloudai.api.operations import OPERATIONS
from cloudai.cli import main as command_line
from cloudai.errors import HTTP_STATUS, MEANING, Code
from cloudai.resources import REASON_MEANING, Reason

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def command_names(group: click.Group, path: str = "cloudai") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield f"{path} {name}"
        if isinstance(command, click.Group):
            yield from command_names(command, f"{path} {name}")


def flags_of(words: list[str]) -> set[str]:
    """The flags that the command named by `words` takes."""
    command: click.Command = command_line
    for word in words:
        assert isinstance(command, click.Group), words
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"no such command: cloudai {' '.join(words)}"
        command = found
    return {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}


def code_lines(document: Path) -> Iterator[str]:
    """Lines of code blocks, and code within sentences."""
    text = document.read_text()
    yield from re.findall(r"^    (.+)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def test_the_generated_documents_equal_their_source() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_error_and_every_reason_has_a_meaning() -> None:
    assert set(MEANING) == set(Code) == set(HTTP_STATUS)
    assert set(REASON_MEANING) == set(Reason)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path) if path else document
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_a_document_shows_exist(document: Path) -> None:
    for line in code_lines(document):
        for shown in re.findall(r"(?:^|[\s/$])cloudai ((?:[a-z]+ ?)+)((?: ?--?[a-z][\w-]*(?:[ =][^\s-]\S*)?)*)", line):
            words = [word for word in shown[0].split() if word]
            known = [word for word in words[:1] if word] + (words[1:2] if words[:1] == ["token"] else [])
            used = set(re.findall(r"(?<!\S)(--?[a-z][\w-]*)", shown[1]))
            assert used - {"-h", "--help"} <= flags_of(known), line


def test_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for line in code_lines(document):
            assert set(re.findall(r"^make ([a-z-]+)", line)) <= targets, line


def test_every_command_is_in_the_readme_or_under_one_that_is() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in command_names(command_line):
        assert " ".join(name.split()[:2]) in readme, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    for path in re.findall(r"`((?:cloudai|controller|agent|tests|scripts|docs)/[\w./-]*)`", document.read_text()):
        assert (ROOT / path).exists(), path
    for line in code_lines(document):
        for path in re.findall(r"(?<![\w/.-])((?:charts|manifests)/[\w./-]*)", line):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_variables_that_a_document_names_are_settings(document: Path) -> None:
    from cloudai.settings import Settings, variable

    known = {variable(name) for name in Settings.model_fields}
    for name in re.findall(r"CLOUDAI_[A-Z_]+[A-Z]", document.read_text()):
        assert name in known or name.startswith("CLOUDAI_TEST"), name


def test_every_endpoint_and_field_is_documented() -> None:
    documented = "".join((ROOT / "docs" / name).read_text() for name in ("api-reference.md", "api.md"))
    for operation in OPERATIONS:
        assert operation.path in documented, operation.path
        for model in (operation.query, operation.body, operation.answer):
            for field in model.model_fields if model else ():
                assert f"`{field}" in documented or f'"{field}"' in documented, field
