"""The log's forms, and how it is changed at run time: by a real server, with a socket in the place of the journal's."""

from __future__ import annotations

import array
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecing.control.journal import JournalHandler
from fleecing.control.logs import JsonLines
from fleecing.events import Event, tell
from tests.images import MIB, make_image
from tests.peers import DEADLINE, Child, Children, run
from tests.serving import ROOT, Serve, Server

JOURNALD = """
import sys, fleecing.control.journal as journal
journal.SOCKET = sys.argv.pop(1)
sys.argv[0] = "fleecing"
from fleecing.cli.main import main
main()
"""

IN_THE_JOURNAL = 'export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec "$@"'
"""Makes the program's stderr the one that systemd means."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_image(path, MIB)
    return path


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "journal"))
        listener.settimeout(DEADLINE)
        yield listener


def fields_in(datagram: bytes) -> dict[str, str]:
    """As the journal takes it apart."""
    found = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest.startswith(b"\n")
            rest = rest[1:]
        found[name.decode()] = value.decode()
        datagram = rest
    return found


def received(journal: socket.socket, event: str) -> dict[str, str]:
    """The fields of the next line that tells this event."""
    while True:
        fields = fields_in(journal.recv(1 << 20))
        if fields.get("EVENT") == event:
            return fields


def serve_command(image: Path, folder: Path, *options: str) -> list[str]:
    places = ["--unix", str(folder / "n.sock"), "--control", str(folder / "c.sock"), "--state-dir", str(folder / "s")]
    return ["serve", str(image), *places, *options]


def uri_of(folder: Path) -> str:
    return f"nbd+unix:///vda?socket={folder}/n.sock"


def lines_of(child: Child) -> list[dict[str, Any]]:
    return [json.loads(line) for line in child.stderr.splitlines()]


def test_json_has_the_fields_of_each_event(children: Children, image: Path, tmp_path: Path) -> None:
    command = serve_command(image, tmp_path, "--log-format", "json")
    server = children.start(sys.executable, "-m", "fleecing", *command, env={"PYTHONPATH": str(ROOT)})
    server.wait_for_line("server-ready")
    run("nbdinfo", "--size", uri_of(tmp_path))
    server.wait_for_line("client-left")
    assert server.stop() == 0
    lines = lines_of(server)  # every line is an object
    assert all(line["time"].endswith("+00:00") and line["level"] == "info" for line in lines)
    told = {line["event"]: line for line in lines if "event" in line}
    assert list(told) == ["disk-opened", "server-ready", "client-came", "client-left", "server-stopping"]
    assert (told["disk-opened"]["disk"], told["disk-opened"]["path"]) == ("vda", str(image))
    assert told["disk-opened"]["size"] == MIB
    left = told["client-left"]
    assert (left["client"], left["export"], left["disk"], left["bytes_read"]) == ("unix", "vda", "vda", 0)
    assert "snapshot" not in left
    assert left["message"].startswith("client unix left vda: ")


def test_a_server_of_systemd_writes_fields_into_the_journal(
    children: Children, journal: socket.socket, image: Path, tmp_path: Path
) -> None:
    program = [sys.executable, "-c", JOURNALD, str(journal.getsockname())]
    command = serve_command(image, tmp_path)
    server = children.start("bash", "-c", IN_THE_JOURNAL, "bash", *program, *command, env={"PYTHONPATH": str(ROOT)})
    assert received(journal, "disk-opened")["DISK"] == "vda"
    received(journal, "server-ready")
    run("nbdinfo", "--size", uri_of(tmp_path))
    came = received(journal, "client-came")
    assert (came["CLIENT"], came["EXPORT"], came["PRIORITY"]) == ("unix", "vda", "6")
    assert (came["MESSAGE"], came["SYSLOG_IDENTIFIER"]) == ("client unix opened vda", "fleecing")
    assert came["CODE_FILE"].endswith("/listener.py")
    assert server.stop() == 0
    assert server.stderr == ""


def test_text_is_for_everything_that_is_not_the_journal(children: Children, image: Path, tmp_path: Path) -> None:
    """$JOURNAL_STREAM is inherited, and names another stream."""
    command = serve_command(image, tmp_path)
    env = {"PYTHONPATH": str(ROOT), "JOURNAL_STREAM": "1:1"}
    server = children.start(sys.executable, "-m", "fleecing", *command, env=env)
    server.wait_for_line("^Ready. Ctrl-C or SIGTERM stops the server.$")
    server.wait_for_line(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO disk vda opened: ")


def log_line(handler: logging.Handler, text: str, *, error: Exception | None = None) -> None:
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, text, None, None)
    if error is not None:
        record.exc_info = (type(error), error, None)
    handler.handle(record)


def test_a_text_of_several_lines_is_one_field_of_the_journal(journal: socket.socket) -> None:
    handler = JournalHandler(sys.stderr, journal.getsockname())
    log_line(handler, "it broke", error=ValueError("a\nb=c"))
    fields = fields_in(journal.recv(1 << 20))
    assert fields["MESSAGE"] == "it broke\nValueError: a\nb=c"
    assert fields["PRIORITY"] == "3"
    handler.close()


def test_what_no_datagram_can_hold_is_passed_as_a_sealed_file(journal: socket.socket) -> None:
    handler = JournalHandler(sys.stderr, journal.getsockname())
    text = "x" * (1 << 23)
    log_line(handler, text)
    data, passed, _, _ = journal.recvmsg(10, 100)
    (fd,) = array.array("i", passed[0][2])
    with os.fdopen(fd, "rb") as file:
        assert data == b""
        assert fields_in(os.pread(fd, 1 << 24, 0))["MESSAGE"] == text
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"y", 0)
        file.close()
    handler.close()


def test_without_a_journal_lines_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = JournalHandler(sys.stderr, str(tmp_path / "nowhere"))
    log_line(handler, "still here")
    assert capsys.readouterr().err == "still here\n"
    handler.close()


def test_an_exception_stays_on_its_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "it broke", None, None)
    error = ValueError("a\nb")
    record.exc_info = (ValueError, error, None)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["exception"] == "ValueError: a\nb"


@pytest.mark.parametrize("name", ["name", "args", "msg"])
def test_a_field_may_have_any_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("test")
    with caplog.at_level(logging.INFO):
        tell(log, logging.INFO, Event.DISK_OPENED, "disk %s", "vda", **{name: "x"})
    assert json.loads(JsonLines().format(caplog.records[-1]))["event"] == "disk-opened"


# At run time.


def wait_until_alone(server: Server) -> None:
    """What clients that have ended had sent is served by then."""
    while server.status()["clients"]:
        pass


def requests_logged(server: Server) -> list[str]:
    return [line.partition("< ")[2] for line in server.log.splitlines() if " DEBUG < " in line]


def test_requests_of_one_export_are_logged_and_of_no_other(serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "vdb.img"
    make_image(other, MIB)
    server = serve({"vda": image, "vdb": other})
    read = ("-f", "raw", "-c", "read 4096 512")
    run("qemu-io", *read, server.uri("vdb"))
    wait_until_alone(server)
    assert server.control.request("PATCH", "/v1/log", {"debug_exports": ["vdb"]}) == {
        "format": "text",
        "level": "info",
        "debug_exports": ["vdb"],
    }
    run("qemu-io", *read, server.uri("vda"))
    assert requests_logged(server) == []
    run("qemu-io", *read, server.uri("vdb"))
    server.child.wait_for_line(r"DEBUG < unix of vdb: READ flags 0x0 cookie 0x[0-9a-f]+ 4096\+512$")
    wait_until_alone(server)
    server.control.request("PATCH", "/v1/log", {"debug_exports": []})
    run("qemu-io", *read, server.uri("vdb"))
    server.stop()
    assert " DEBUG " not in server.log.partition("requests logged of exports: none")[2]


def test_a_refusal_is_logged_with_the_export_that_is_looked_at(serve: Serve, image: Path) -> None:
    server = serve(image, "--debug-export", "vda@s")
    uri = server.snapshot(name="s")
    run("qemu-io", "-f", "raw", "-c", "discard 0 64k", "-c", "read 0 512", uri, expect=1)
    server.child.wait_for_line(r"DEBUG ! vda@s: cookie 0x[0-9a-f]+ EINVAL: cluster at offset 0: trimmed$")


def test_the_level_holds_lines_back_and_no_events(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.control.request("PATCH", "/v1/log", {"level": "error"})
    events = server.control.lines("/v1/events", {})
    next(events)
    server.snapshot(name="s")
    assert any("snapshot-created" in line for line in events)
    server.delete("vda@s")
    server.control.request("PATCH", "/v1/log", {"level": "debug"})
    run("nbdinfo", "--size", server.uri())
    server.child.wait_for_line("DEBUG < unix of vda: DISC")
    assert "vda@s" not in server.log


def test_a_change_that_makes_no_sense_changes_nothing(serve: Serve, image: Path) -> None:
    server = serve(image)
    for change, sentence in (
        ({"level": "loud"}, "level: Input should be"),
        ({"debug_exports": ["a@b@c"]}, "'b@c' is no name"),
        ({"debug_exports": "vda"}, "debug_exports: Input should be"),
        ({"format": "json"}, "format: is no known setting"),
    ):
        form = ["-s", "-X", "PATCH", "--unix-socket", str(server.control_path), "-d", json.dumps(change)]
        assert sentence in json.loads(run("curl", *form, "http://localhost/v1/log"))["error"]
    assert server.control.request("GET", "/v1/log") == {"format": "text", "level": "info", "debug_exports": []}
