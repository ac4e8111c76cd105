"""What stands behind the socket of a guest agent: QEMU's port, which knows no connections, and the agent in the guest.

    with FakeAgent(tmp_path / "agent") as agent:
        agent.hold["guest-fsfreeze-freeze"] = threading.Event()     # it is done when this is set
        ...
        assert agent.frozen

One client has the port at a time. What the agent says while nobody is there, the next client gets. The byte 0xFF ends
whatever was sent before it, with an error where that was something.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.peers import DEADLINE, listen_unix


class FakeAgent:
    """`commands`: what it was asked. `errors`: what it refuses. `mute`: it answers nothing, ever."""

    def __init__(self, path: Path, *, stale: bytes = b"") -> None:
        self.path = path
        self.commands: list[str] = []
        self.frozen = False
        self.file_systems = 2
        self.mute = False
        self.errors: dict[str, str] = {}
        self.hold: dict[str, threading.Event] = {}  # a command is done only then
        self.hold_answer: dict[str, threading.Event] = {}  # it is done, but answered only then
        self.on: dict[str, Callable[[], None]] = {}  # called when it is done
        self._changed = threading.Condition()
        self._stale = stale
        self._client: socket.socket | None = None
        self._input: queue.Queue[bytes | None] = queue.Queue()
        self._listener = listen_unix(path)
        self._threads = [threading.Thread(target=self._port), threading.Thread(target=self._agent)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, condition: Callable[[FakeAgent], bool]) -> None:
        """Until it holds; looked at after each command."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), DEADLINE), self.commands

    def _port(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                self._client = client
                stale, self._stale = self._stale, b""
            self._say(stale)
            try:
                while data := client.recv(4096):
                    self._input.put(data)
            except OSError:
                pass
            with self._changed:
                self._client = None
            client.close()

    def _say(self, data: bytes) -> None:
        with self._changed:
            try:
                if self._client is not None:
                    self._client.sendall(data)
                    return
            except OSError:
                pass
            self._stale += data

    def _agent(self) -> None:
        line = b""
        while (data := self._input.get()) is not None:
            for byte in data:
                if byte == 0xFF:
                    if line:
                        self._answer({"error": {"class": "GenericError", "desc": "JSON parse error"}})
                    line = b""
                elif byte == 0x0A:
                    self._do(json.loads(line))
                    line = b""
                else:
                    line += bytes([byte])

    def _answer(self, answer: Any) -> None:
        if not self.mute:
            self._say(json.dumps(answer).encode() + b"\n")

    def _do(self, question: dict[str, Any]) -> None:
        command = question["execute"]
        with self._changed:
            self.commands.append(command)
            self._changed.notify_all()
        if command in self.hold:
            self.hold[command].wait(DEADLINE)
        result: Any = None
        if command in self.errors:
            return self._answer({"error": {"class": "GenericError", "desc": self.errors[command]}})
        if command == "guest-sync-delimited":
            if not self.mute:
                self._say(b"\xff")
            result = question["arguments"]["id"]
        elif command == "guest-fsfreeze-status":
            result = "frozen" if self.frozen else "thawed"
        elif command == "guest-fsfreeze-freeze":
            self.frozen, result = True, self.file_systems
        else:
            assert command == "guest-fsfreeze-thaw"
            result = self.file_systems if self.frozen else 0
            self.frozen = False
        if command in self.on:
            self.on[command]()
        with self._changed:
            self._changed.notify_all()
        if command in self.hold_answer:
            self.hold_answer[command].wait(DEADLINE)
        return self._answer({"return": result})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for event in (*self.hold.values(), *self.hold_answer.values()):
            event.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            if self._client is not None:
                self._client.shutdown(socket.SHUT_RDWR)
        self._input.put(None)
        for thread in self._threads:
            thread.join(DEADLINE)
