"""The command line as it reads before any server is asked."""

from __future__ import annotations

import hashlib
import json
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cloudai.cli import COMMANDS, main
from cloudai.cli.options import setting_flags
from cloudai.cli.serve import KUBERNETES
from cloudai.settings import Settings, flag, parts, variable

SERVER_LIBRARIES = {"sqlalchemy", "sqlmodel", "starlette", "uvicorn", "alembic", "cloudai.api", "cloudai.store.sql"}
NOWHERE = "http://127.0.0.1:1"


def cloudai(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="cloudai", env=environment)


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter holds once `code` has run."""
    script = f"import sys\n{code}\nimport json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    result = cloudai(name, "--help")
    assert result.exit_code == 0
    assert "Usage: cloudai" in result.output


def test_join_tokens_are_made_listed_and_revoked(tmp_path: Path) -> None:
    place = ("--data-dir", str(tmp_path))
    new, known = (cloudai("token", "create", "c", *place).stderr for _ in range(2))
    assert ("That store is new" in new, "That store is new" in known) == (True, False)
    for token in json.loads(cloudai("token", "list", "--json", *place).output):
        cloudai("token", "revoke", token["id"], *place)
    made = {name: json.loads(cloudai("token", "create", name, "--json", *place).output)["token"] for name in ("a", "b")}
    text = cloudai("token", "list", *place).output
    assert [line.split()[1] for line in text.splitlines()] == ["NAME", "a", "b"]
    first, second = json.loads(cloudai("token", "list", "--json", *place).output)
    assert (first["name"], first["id"]) == ("a", hashlib.sha256(made["a"].encode()).hexdigest()[:12])
    assert not any(token in text for token in made.values())
    assert "`a`" in cloudai("token", "revoke", first["id"], *place).output
    assert json.loads(cloudai("token", "list", "--json", *place).output) == [second]
    again = cloudai("token", "revoke", first["id"], *place)
    assert (again.exit_code, "cloudai token list" in again.output) == (1, True)


def test_an_unknown_command_is_wrong_usage() -> None:
    assert cloudai("run").exit_code == 2


def test_every_setting_is_a_flag_of_up_but_those_that_concern_other_machines() -> None:
    text = cloudai("up", "--help").output
    elsewhere = {"server", "token_file", *KUBERNETES}
    for name in Settings.model_fields:
        if name in elsewhere or parts(name) == {"operator"}:
            continue
        assert flag(name) in text
        assert variable(name) in text


@pytest.mark.parametrize("part", ["api", "controller", "agent", "operator"])
def test_a_part_takes_the_flags_of_its_settings_only(part: str) -> None:
    text = cloudai(part, "--help").output
    for name in Settings.model_fields:
        assert (f"{flag(name)} " in text or f"{flag(name)}/" in text or f"{flag(name)}\n" in text) == (
            part in parts(name)
        )


def test_a_bad_flag_of_a_server_part_is_wrong_usage_in_a_sentence() -> None:
    result = cloudai("api", "--port", "70000")
    assert result.exit_code == 2
    assert "--port must be less than or equal to 65535, not '70000'" in result.output


def test_an_unknown_variable_stops_a_client() -> None:
    result = cloudai("ps", CLOUDAI_SERVR=NOWHERE)
    assert (result.exit_code, "did you mean CLOUDAI_SERVER?" in result.output) == (2, True)


def test_a_client_may_run_inside_a_task() -> None:
    assert cloudai("ps", CLOUDAI_SERVER=NOWHERE, CLOUDAI_TASK_ID="task-1", CLOUDAI_ATTEMPT="1").exit_code == 3


def test_an_unknown_variable_stops_a_server_part() -> None:
    result = cloudai("controller", CLOUDAI_PROT="1")
    assert result.exit_code == 2
    assert "unknown setting CLOUDAI_PROT; did you mean CLOUDAI_PORT?" in result.output


def test_an_agent_without_a_token_is_told_how_to_get_one() -> None:
    result = cloudai("agent")
    assert result.exit_code == 2
    assert "cloudai token create" in result.output


@pytest.mark.parametrize("command", [["ps"], ["get", "task-1"], ["status"], ["submit", "-i", "busybox"]])
def test_a_server_that_is_not_there_is_told_by_its_url_and_exit_status_3(command: list[str]) -> None:
    result = cloudai(*command, "--server", NOWHERE)
    assert result.exit_code == 3
    assert NOWHERE in result.output
    assert "cloudai up" in result.output


@pytest.fixture(params=[b"<html>", b'{"hello": 1}', b"[1]"])
def foreign(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of something else, such as a portal that wants a login first."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(request.param)))
            self.end_headers()
            self.wfile.write(request.param)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("command", ["ps", "get t", "cancel t", "wait t", "logs t", "workers", "status"])
def test_what_is_no_cloudai_is_told(foreign: str, command: str) -> None:
    result = cloudai(*command.split(), "--server", foreign)
    assert (result.exit_code, result.output) == (1, f"What answers at {foreign} is no CloudAI API; check --server\n")


def test_ctrl_c_while_a_command_is_loaded_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cloudai.cli.importlib.import_module", interrupted)
    assert cloudai("ps").exit_code == 130


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("up", "--data-dir", ""), "--data-dir must not be empty"),
        (("up", "--data-dir", "d\udcff"), "--data-dir must be a path in UTF-8"),
        (("token", "create", "a\udcff"), "NAME must be a line of at most 63 characters"),
        (("token", "create", "a\nb"), "NAME must be a line of at most 63 characters"),
        (("token", "create", ""), "NAME must be a line of at most 63 characters"),
        (("submit", "-i", "x", "--", ""), "COMMAND must not be empty"),
    ],
)
def test_a_name_that_can_be_none_is_wrong_usage(arguments: tuple[str, ...], words: str) -> None:
    result = cloudai(*arguments)
    assert (result.exit_code, words in result.output) == (2, True)


def test_the_server_comes_from_the_environment() -> None:
    assert NOWHERE in cloudai("ps", CLOUDAI_SERVER=NOWHERE).output


@pytest.mark.parametrize(
    "url",
    [
        "master-node:8080",
        "http://",
        "http://a b",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:-5",
        "http://[::1",
        "http://xn--/",
    ],
)
def test_a_server_that_is_no_url_is_wrong_usage(url: str) -> None:
    result = cloudai("ps", "--server", url)
    assert result.exit_code == 2
    assert "http://master-node:8080" in result.output


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "ключ", "x" * 256])
def test_an_idempotency_key_that_no_header_can_hold_is_wrong_usage(key: str) -> None:
    result = cloudai("submit", "-i", "image", "--idempotency-key", key)
    assert result.exit_code == 2
    assert "visible ASCII" in result.output


@pytest.mark.parametrize(
    "command", [["submit", "-i", "image", "caf\udce9"], ["get", "\udcff"], ["ps", "--user", "\udcff"]]
)
def test_an_argument_that_is_no_text_is_wrong_usage(command: list[str]) -> None:
    result = cloudai(*command, "--server", NOWHERE) if command[0] != "submit" else cloudai(*command)
    assert result.exit_code == 2
    assert "UTF-8" in result.output


@pytest.mark.parametrize("task_id", ["", "../../etc", "a/b"])
@pytest.mark.parametrize("command", ["get", "cancel", "wait", "logs"])
def test_what_cannot_be_a_task_is_not_found(command: str, task_id: str) -> None:
    result = cloudai(command, "--server", NOWHERE, task_id)
    assert (result.exit_code, result.output[:14]) == (1, "Task not found")


def test_output_that_cannot_be_written_is_told() -> None:
    with Path("/dev/full").open("w") as full, socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Empty) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        command = [sys.executable, "-m", "cloudai", "ps", "-a", "--server", url]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
        server.shutdown()
    assert (done.returncode, done.stderr) == (1, "The output cannot be written: No space left on device\n")


class _Empty(socketserver.StreamRequestHandler):
    """An API without tasks."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        body = b'{"tasks": [], "total": 0, "limit": 50, "offset": 0}'
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


@pytest.mark.parametrize("amount", ["nan", "inf", "much"])
def test_an_amount_that_is_no_number_is_wrong_usage(amount: str) -> None:
    assert cloudai("submit", "-i", "x", "--cpu", amount, "--server", NOWHERE).exit_code == 2


def test_client_commands_load_no_server_library_and_no_settings() -> None:
    loaded = modules_after("import cloudai.cli.submit, cloudai.cli.tasks, cloudai.cli.cluster")
    assert not loaded & (SERVER_LIBRARIES | {"pydantic", "cloudai.settings"})


def test_an_agent_loads_no_facade_and_no_sql() -> None:
    assert not modules_after("import cloudai.cli.serve, cloudai.cli.working") & SERVER_LIBRARIES


def test_flags_keep_the_order_of_the_settings() -> None:
    @click.command()
    @setting_flags("data_dir", "port", "host")
    def command() -> None: ...

    assert [parameter.name for parameter in command.params] == ["host", "port", "data_dir"]
