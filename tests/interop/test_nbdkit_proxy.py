"""nbdkit as a proxy in front of the server, with filters that are strict or faulty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import KIB, MIB, make_image, make_sparse, random_bytes
from tests.peers import Children, listen_unix, run, run_any
from tests.serving import Serve

SIZE = 8 * MIB + 777
Proxy = Callable[..., str]


@pytest.fixture
def proxy(children: Children, tmp_path: Path) -> Proxy:
    """Starts a proxy in front of a URI; its own URI. Arguments "--filter=..." come before the plugin's."""
    number = 0

    def start(uri: str, *arguments: str) -> str:
        nonlocal number
        number += 1
        path = tmp_path / f"proxy{number}.sock"
        filters = [argument for argument in arguments if argument.startswith("--")]
        rest = [argument for argument in arguments if not argument.startswith("--")]
        children.start("nbdkit", "-f", *filters, "nbd", f"uri={uri}", *rest, activate=listen_unix(path))
        return f"nbd+unix:///?socket={path}"

    return start


def test_checkwrite_finds_the_pulled_bytes_in_the_snapshot(serve: Serve, tmp_path: Path, proxy: Proxy) -> None:
    """The filter compares what is written to it with what it reads from us, and zeroes with our extents."""
    contents = {0: random_bytes(3 * MIB), 5 * MIB: random_bytes(MIB), SIZE - 700: random_bytes(700)}
    make_sparse(tmp_path / "disk.raw", SIZE, contents)
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot()
    run("nbdcopy", frozen, str(tmp_path / "pulled.raw"))
    run("qemu-io", "-f", "raw", "-c", "write -P 1 2M 5M", server.uri())
    run("nbdcopy", str(tmp_path / "pulled.raw"), proxy(frozen, "--filter=checkwrite"))
    result = run_any("nbdcopy", str(tmp_path / "pulled.raw"), proxy(server.uri(), "--filter=checkwrite"))
    assert result.returncode == 1
    assert "Input/output error" in result.stderr


def test_the_block_sizes_pass_through_a_proxy(serve: Serve, tmp_path: Path, proxy: Proxy) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    uri = proxy(serve(tmp_path / "disk.raw", "--cluster-size", "256K").snapshot())
    sizes = run("nbdinfo", uri)
    assert "block_size_minimum: 1\n" in sizes
    assert f"block_size_preferred: {256 * KIB}\n" in sizes
    assert f"block_size_maximum: {64 * MIB}\n" in sizes


def test_a_client_that_keeps_to_the_block_sizes_is_never_refused(serve: Serve, tmp_path: Path, proxy: Proxy) -> None:
    """The filter refuses what is outside of the sizes that we advertise, and says so on the way."""
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    strict = ["--filter=blocksize-policy", "blocksize-error-policy=error"]
    frozen = proxy(server.snapshot(), *strict)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", frozen, str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes()[:SIZE] == old
    run("nbdcopy", str(tmp_path / "pulled.raw"), f"{tmp_path}/again.raw")
    active = proxy(server.uri(), *strict)
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 1 777 1M", "-c", "write -z 2M 99", "-c", "discard 3M 1M",
        "-c", "read -P 1 777 1M", "-c", "read -P 0 2M 99", active)  # fmt: skip


def test_a_proxy_that_cuts_requests_to_clusters_sees_the_same_bytes(serve: Serve, tmp_path: Path, proxy: Proxy) -> None:
    old = make_image(tmp_path / "disk.raw", 8 * MIB)
    server = serve(tmp_path / "disk.raw")
    frozen = proxy(server.snapshot(), "--filter=blocksize", "minblock=64k", "maxdata=64k", "maxlen=64k")
    active = proxy(server.uri(), "--filter=blocksize", "minblock=64k", "maxdata=64k", "maxlen=64k")
    run("qemu-io", "-f", "raw", "-c", "write -P 9 1000 3M", "-c", "read -P 9 1000 3M", active)
    run("nbdcopy", frozen, str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes() == old


def test_a_pull_that_connects_again_in_the_middle_is_exact(serve: Serve, tmp_path: Path, children: Children) -> None:
    """A filter fails all reads while a file is there; another one tries again, each time over a new connection."""
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot(name="s")
    run("qemu-io", "-f", "raw", "-c", "write -P 9 1000 3M", server.uri())
    trouble = tmp_path / "trouble"
    trouble.touch()
    path = tmp_path / "proxy.sock"
    kit = children.start(
        *("nbdkit", "-fv", "--filter=retry", "--filter=error", "nbd", f"uri={frozen}"),
        *("error-pread-rate=100%", f"error-file={trouble}", "retries=60", "retry-delay=1", "retry-exponential=no"),
        activate=listen_unix(path),
    )
    pull = children.start(
        *("nbdcopy", "-C", "1", "-R", "1", f"nbd+unix:///?socket={path}", str(tmp_path / "pulled.raw"))
    )
    kit.wait_for_line("injecting EIO error")
    trouble.unlink()
    assert pull.wait() == 0
    assert (tmp_path / "pulled.raw").read_bytes() == old
    assert server.log.count("opened vda@s") > 1


def test_several_clients_share_one_connection_of_a_proxy(serve: Serve, tmp_path: Path, proxy: Proxy) -> None:
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    shared = proxy(server.snapshot(), "shared=true")
    run("nbdcopy", "-C", "4", shared, str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes() == old


def test_trims_pass_through_a_proxy(serve: Serve, tmp_path: Path, proxy: Proxy) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    uri = proxy(server.snapshot(name="s"))
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 1M 7M", uri)
    assert server.map("vda@s") == [(0, MIB, "untouched"), (MIB, 7 * MIB, "trimmed"), (8 * MIB, 777, "untouched")]
