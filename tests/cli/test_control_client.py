"""The client of the control socket, against servers that are not there, not ours, or broken."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleecing.cli.control_client import ControlClient
from fleecing.errors import ControlError


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[str]:
    """A server at `path` that sends `answer` to whatever it is asked, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield str(path)
        thread.join()


def dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def http(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def refusal(path: str, timeout: float = 60) -> tuple[int, str]:
    with pytest.raises(ControlError) as caught:
        ControlClient(path, timeout).request("GET", "/v1/status")
    return caught.value.status, caught.value.text


def test_an_answer_is_its_json(tmp_path: Path) -> None:
    with answering(tmp_path / "s", http("200 OK", '{"a": 1}')) as path:
        assert ControlClient(path).request("GET", "/x") == {"a": 1}


def test_a_refusal_is_the_servers_sentence(tmp_path: Path) -> None:
    with answering(tmp_path / "s", http("409 Conflict", '{"error": "the name is taken"}')) as path:
        assert refusal(path) == (409, "the name is taken")


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-OpenSSH\r\n", http("200 OK", "<html>"), http("500 Oops", "[1]"), http("500 Oops", '{"x": 1}')],
)
def test_what_is_no_server_of_ours_is_told(tmp_path: Path, answer: bytes) -> None:
    with answering(tmp_path / "s", answer) as path:
        status, text = refusal(path)
    assert status == 502
    assert f"control socket {path}" in text


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch(), dead_socket])
def test_where_no_server_listens_the_way_out_is_told(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "s")
    status, text = refusal(str(tmp_path / "s"))
    assert status == 503
    assert text.startswith(f"no server answers on control socket {tmp_path}/s: start one with `fleecing serve`")


def test_a_server_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        status, text = refusal(str(tmp_path / "s"), timeout=0.05)
    assert (status, "gave no answer in 0.05 s" in text) == (504, True)


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    assert "the system allows 107" in refusal("/" + "x" * 120)[1]
