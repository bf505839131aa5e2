"""What a server part takes on its machine."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from pathlib import Path

import pytest

from cloudai.api.hosts import is_loopback
from cloudai.cli.place import (
    StartRefused,
    digest,
    held_data_dir,
    listen,
    local_token,
    new_local_token,
    read_token,
    url_of,
)
from cloudai.settings import load


def test_a_data_directory_is_made_for_its_user_only(tmp_path: Path) -> None:
    with held_data_dir(load({"data_dir": tmp_path / "a" / "b"}), "up") as directory:
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_data_directory_on_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(StartRefused, match="No space left on device"),
        held_data_dir(load({"data_dir": tmp_path}), "up"),
    ):
        pass


def test_a_data_directory_serves_one_process_of_a_role_at_a_time(tmp_path: Path) -> None:
    settings = load({"data_dir": tmp_path})
    again = held_data_dir(settings, "agent a")
    with held_data_dir(settings, "up"), held_data_dir(settings, "agent a"), held_data_dir(settings, "agent b"):
        with pytest.raises(StartRefused) as refused:
            again.__enter__()
        assert "another `cloudai agent a`" in str(refused.value)
    with held_data_dir(settings, "agent a"):
        pass


def test_port_0_takes_a_free_one() -> None:
    with listen(load({"port": 0})) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, "127.0.0.1") == f"http://127.0.0.1:{port}"
        assert url_of(listener, "0.0.0.0") == f"http://127.0.0.1:{port}"
        assert url_of(listener, "::") == f"http://[::1]:{port}"


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartRefused, match="--port"):
        listen(load({"port": taken.getsockname()[1]}))


@pytest.mark.parametrize("host", ["no host", "a..b", "a" * 64])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(StartRefused, match="--host"):
        listen(load({"host": host, "port": 0}))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback_is_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_local_token_is_kept_and_readable_by_its_user_only(tmp_path: Path) -> None:
    assert local_token(tmp_path) is None
    first = new_local_token(tmp_path)
    assert local_token(tmp_path) == first
    assert new_local_token(tmp_path) != first
    assert (tmp_path / "agent.token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"\xff\xfe\x00", "tök".encode()])
def test_a_token_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(StartRefused, match="token create"):
        read_token(path)


def test_the_store_keeps_the_sha256_of_a_token() -> None:
    assert digest("token") == hashlib.sha256(b"token").digest()
