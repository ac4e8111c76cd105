"""`fleecing serve` that cannot start, and `check-config`: one sentence each, exit code 1, nothing half-made."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fleecing.cli.main import main
from fleecing.nbd.constants import ReplyMode
from fleecing.units import MiB
from tests.peers import Children, listen_unix, run
from tests.raw_client import READ, RawClient
from tests.serving import Serve


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(b"\1" * MiB)
    return path


def fleecing(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def start(folder: Path, image: object, *options: object) -> str:
    """The sentence with which a server in `folder` refuses to start."""
    places = ("--unix", folder / "n.sock", "--control", folder / "c.sock", "--state-dir", folder / "state")
    result = fleecing("serve", image, *places, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("Error: ")
    assert not (folder / "n.sock").exists()
    assert not (folder / "c.sock").exists()
    return sentence


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    assert f"image {tmp_path}/no.img of disk 'no' cannot be opened: No such file" in start(
        tmp_path, tmp_path / "no.img"
    )
    assert not (tmp_path / "state").exists()


def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.img").touch()
    assert "is empty: an image needs a size" in start(tmp_path, tmp_path / "a.img")


def test_what_is_neither_a_file_nor_a_block_device_is_no_image(tmp_path: Path) -> None:
    """A pipe without waiting for its other end."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", tmp_path / "pipe", tmp_path):
        assert "is neither a regular file nor a block device" in start(tmp_path, str(path))


def test_a_qcow2_image_is_refused_unless_its_bytes_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "q.img"
    path.write_bytes(b"QFI\xfb" + bytes(MiB))
    assert "is a qcow2 image and this release serves raw ones only" in start(tmp_path, path)
    assert "format 'qcow2' is not served in this release" in start(tmp_path, path, "--format", "qcow2")
    (tmp_path / "state").touch()
    assert "state folder" in start(tmp_path, path, "--format", "raw")


def test_an_image_that_is_served_is_refused(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve(image)
    assert "is locked: another server has this image open" in start(tmp_path, image)
    assert server.status()["disks"][0]["problem"] is None


def test_an_image_that_qemu_nbd_writes_to_is_refused_unless_locks_are_off(
    serve: Serve, image: Path, tmp_path: Path, children: Children
) -> None:
    socket_path = tmp_path / "q.sock"
    words = ["-t", "-f", "raw", "-x", "", "--shared=0"]
    children.start("qemu-nbd", *words, str(image), activate=listen_unix(socket_path))
    run("nbdinfo", "--size", f"nbd+unix:///?socket={socket_path}")
    assert "is in use: another program (QEMU, qemu-img, qemu-nbd, a Fleecing) has it open for writing" in start(
        tmp_path, image
    )
    assert serve(image, "--image-lock", "off").status()["disks"][0]["problem"] is None
    config = tmp_path / "off.toml"
    config.write_text(f'[disk.vda]\npath = "{image}"\nimage-lock = "off"\n')
    assert json.loads(fleecing("check-config", config, "--json").stdout)["disk"]["vda"]["image-lock"] is False


def test_nobody_writes_over_an_image_that_is_served(serve: Serve, image: Path, tmp_path: Path) -> None:
    """What is pulled comes from another server, so that nothing but the lock stands in the way."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MiB))
    serve(image)
    result = fleecing("pull", serve(other).snapshot(), image, "--format", "raw", "--existing")
    assert (result.exit_code, "has it open for writing" in result.stderr) == (1, True), result.stderr
    assert image.read_bytes() == b"\1" * MiB


def test_a_socket_of_a_running_server_is_refused(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve(image)
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MiB))
    assert f"socket {server.unix} is in use by a running server" in start(tmp_path, other, "--unix", server.unix)
    control = ("--control", server.control_path)
    assert f"socket {server.control_path} is in use by a running server" in start(tmp_path, other, *control)
    assert server.status()["disks"][0]["problem"] is None


def test_a_port_in_use_is_refused(image: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}: Address already in use" in start(tmp_path, image, "--listen", address)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--listen", "0.0.0.0:0"), "0.0.0.0:0 is open to the network without encryption"),
        (("--listen", "some.host:0"), "some.host:0 is open to the network without encryption"),
        (("--listen", "0.0.0.0:0", "--tls", "allow", "--tls-dir", "/"), "is open to the network without encryption"),
        (("--tls", "require"), "TLS needs tls-dir (--tls-dir)"),
        (("--tls-verify-client",), "tls-verify-client needs TLS"),
        (("--tls", "require", "--tls-dir", "/nowhere"), "TLS needs /nowhere/server-cert.pem, which cannot be read"),
    ],
)
def test_what_would_be_open_by_mistake_is_refused(
    image: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    assert sentence in start(tmp_path, image, *options)


@pytest.mark.parametrize("option, what", [("--state-dir", "state folder"), ("--temp-dir", "temp folder")])
def test_a_folder_that_takes_no_files_is_refused(image: Path, tmp_path: Path, option: str, what: str) -> None:
    assert f"{what} /proc" in start(tmp_path, image, option, "/proc/1")


def test_a_server_can_start_after_one_that_could_not(serve: Serve, image: Path, tmp_path: Path) -> None:
    start(tmp_path, image, "--temp-dir", "/proc/1")
    assert serve(image).status()["disks"][0]["name"] == "vda"


def test_limits_are_options_too(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve(image, "--limit", "clients=1", "--limit", "handshake-seconds=600")
    with RawClient(server.unix, "vda") as client:
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            assert other.recv(1) == b""
        server.child.wait_for_line("turned away: 1 clients are connected")
        assert client.read(0, 1) == b"\1"
    assert "limits.clients: Input should be a valid integer" in start(tmp_path, image, "--limit", "clients=many")
    assert "limits.users: is no known setting" in start(tmp_path, image, "--limit", "users=1")
    assert fleecing("serve", image, "--limit", "clients").exit_code == 2


def test_clients_that_never_read_cannot_keep_the_memory_from_others(serve: Serve, tmp_path: Path) -> None:
    """Long READs with simple replies take memory until they are sent."""
    image = tmp_path / "big.img"
    with image.open("wb") as file:
        file.truncate(64 * MiB)
    server = serve(image, "--limit", "read-memory=64M", "--limit", "send-seconds=0.2")
    stuck = [RawClient(server.unix, "vda", ReplyMode.SIMPLE) for _ in range(4)]
    for client in stuck:
        client.send(READ, 0, 0, 64 * MiB)
    with RawClient(server.unix, "vda", ReplyMode.SIMPLE) as other:
        assert not any(other.read(0, 32 * MiB))
    for _ in stuck:
        server.child.wait_for_line("client unix of vda dropped: it does not read what is sent to it")
    for client in stuck:
        client.close()


def test_a_configuration_is_checked_and_shown_complete(image: Path, tmp_path: Path) -> None:
    config = tmp_path / "f.toml"
    config.write_text('unix = ["n.sock"]\nlisten = ["[::1]:0"]\n[disk.vda]\npath = "vda.img"\n')
    result = fleecing("check-config", config)
    assert result.exit_code == 0
    assert "[::1]:0 (any free port)" in result.stdout
    assert f"vda: {image}, raw, clusters of 64 KiB" in result.stdout
    shown = json.loads(fleecing("check-config", config, "--json").stdout)
    assert shown["disk"]["vda"] == {
        "path": str(image),
        "format": None,
        "cluster-size": 65536,
        "image-lock": True,
        "guest": None,
    }
    assert shown["unix"] == [str(tmp_path / "n.sock")]


@pytest.mark.parametrize("command", [("check-config",), ("serve", "--config")])
def test_a_configuration_with_a_mistake_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    config = tmp_path / "f.toml"
    config.write_text('[disk.vda]\npath = "x"\nformat = "vmdk"\n')
    result = fleecing(*command, config)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"Error: configuration {config}: disk.vda.format: format 'vmdk' is not served" in result.stderr
