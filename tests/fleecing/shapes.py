"""The graphs that the scenario runs on: our server, and qemu-storage-daemon as the reference.

Both offer a disk that is frozen from the start: `active` and `frozen` are NBD URIs, `trim` is one of the frozen view
that takes TRIM, `temp` the qcow2 file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.fleecing.scenario import KIB
from tests.peers import Child, listen_unix, run
from tests.serving import Server


@dataclass(frozen=True)
class Frozen:
    """A disk with a snapshot. `server` is None where it is not ours."""

    active: str
    frozen: str
    trim: str
    temp: Path
    server: Server | None = None


Shape = Callable[[Path, Path, int], AbstractContextManager[Frozen]]
"""(folder, image, cluster size) -> the graph; everything is stopped on leaving it."""


@contextmanager
def ours(folder: Path, image: Path, cluster: int) -> Iterator[Frozen]:
    """The real server. It deletes its snapshots, and `temp` with them, when it ends."""
    server = Server(folder / "server", image, "--cluster-size", str(cluster))
    try:
        frozen = server.snapshot(name="s")
        yield Frozen(server.uri(), frozen, frozen, server.temp("vda@s"), server)
    finally:
        server.stop()


@contextmanager
def reference(folder: Path, image: Path, cluster: int) -> Iterator[Frozen]:
    """qemu-storage-daemon: copy-before-write with a snapshot-access node above, both exported.

    QEMU before 8.0 answers a read over the boundary of a copied and an uncopied cluster from the live disk, so a proxy
    cuts the reads of the frozen view to 64 KiB: start them at a multiple of that. A TRIM that fits no clusters aborts
    it: send it none. Nothing is discarded where a node on the way lacks discard=unmap.
    """
    assert cluster >= 64 * KIB, "copy-before-write has no smaller clusters"
    temp = folder / "temp.qcow2"
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"cluster_size={cluster}",
        "-F",
        "raw",
        "-b",
        str(image),
        str(temp),
    )
    path, proxied = folder / "daemon.sock", folder / "proxied.sock"
    nodes = [
        f"driver=file,node-name=disk,filename={image},discard=unmap",
        f"driver=file,node-name=temp-file,filename={temp},discard=unmap",
        "driver=qcow2,node-name=temp,file=temp-file,backing=disk,discard=unmap",
        "driver=copy-before-write,node-name=cbw,file=disk,target=temp,discard=unmap",
        "driver=snapshot-access,node-name=access,file=cbw,discard=unmap",
    ]
    exports = ["id=a,node-name=cbw,name=vda,writable=on", "id=s,node-name=access,name=vda@s,writable=on"]
    command = ["qemu-storage-daemon"]
    for node in nodes:
        command += ["--blockdev", node]
    command += ["--nbd-server", "addr.type=fd,addr.str=3,max-connections=16"]
    for export in exports:
        command += ["--export", f"type=nbd,{export}"]
    uri = f"nbd+unix:///{quote('vda@s', safe='@')}?socket={path}"
    cut = ["--filter=blocksize", "nbd", f"uri={uri}", "minblock=512", "maxdata=64k", "maxlen=64k"]
    with (
        Child(command, folder, activate=listen_unix(path)),
        Child(["nbdkit", "-f", *cut], folder, activate=listen_unix(proxied)),
    ):
        yield Frozen(f"nbd+unix:///vda?socket={path}", f"nbd+unix:///?socket={proxied}", uri, temp)
