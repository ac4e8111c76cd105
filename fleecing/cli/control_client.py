"""One call of the control API, made by a blocking client over the Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fleecing.control.sockets import check_socket_path
from fleecing.errors import ControlError

TIMEOUT = 180.0
"""Seconds; longer than the server itself waits for anything that a call may wait for."""


class ControlClient:
    """Talks to the server whose control socket is at `path`."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self.path = path
        self._timeout = timeout

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer. Raises ControlError with the server's sentence, or with one why there is none."""
        return self._answer(*self._call(method, path, body))

    def download(self, path: str) -> bytes:
        """The answer to a GET as it is. Raises ControlError as `request` does."""
        status, content = self._call("GET", path, None)
        if status >= 400:
            self._answer(status, content)
        return content

    def lines(self, path: str, headers: Mapping[str, str]) -> Iterator[str]:
        """The lines of an answer that goes on and on, as they come, until the server ends it. Raises ControlError."""
        connection = _UnixConnection(self.path, self._timeout)
        try:
            with self._explaining():
                connection.request("GET", path, headers=dict(headers))
                response = connection.getresponse()
                text = response.read() if response.status >= 400 else b""
            if response.status >= 400:
                self._answer(response.status, text)
            while True:
                with self._explaining():
                    line = response.readline()
                if not line:
                    return
                yield line.decode().rstrip("\n")
        finally:
            connection.close()

    def _call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        connection = _UnixConnection(self.path, self._timeout)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            with self._explaining():
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                return response.status, response.read()
        finally:
            connection.close()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Whatever goes wrong on the way becomes a ControlError."""
        try:
            yield
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(
                503,
                f"no server answers on control socket {self.path}: start one with `fleecing serve`, "
                "or name its socket with --control or FLEECING_CONTROL",
            ) from None
        except PermissionError:
            raise ControlError(
                403, f"control socket {self.path} is closed to this user: run the command as the server's user"
            ) from None
        except TimeoutError:
            raise ControlError(
                504, f"the server on control socket {self.path} gave no answer in {self._timeout:g} s"
            ) from None
        except (OSError, http.client.HTTPException) as e:
            raise ControlError(
                502, f"talking on control socket {self.path} failed: {str(e) or type(e).__name__}"
            ) from e

    def _answer(self, status: int, text: bytes) -> Any:
        try:
            answer = json.loads(text)
            problem = answer["error"] if status >= 400 else None
        except (ValueError, KeyError, TypeError):
            raise ControlError(502, f"what answers on control socket {self.path} is no Fleecing server") from None
        if problem is not None:
            raise ControlError(status, str(problem))
        return answer


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        try:
            check_socket_path(self._path)
        except ValueError as e:
            raise ControlError(400, str(e)) from None
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
