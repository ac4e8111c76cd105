"""A TCP client whose host is gone: a network of its own, whose only link goes down."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.images import MIB, make_image
from tests.peers import Children, require, run
from tests.serving import ROOT, Serve

# SIOCSIFFLAGS, netdevice(7)
LINK = (
    "import fcntl, os, socket, struct, sys\n"
    "with socket.socket() as any: fcntl.ioctl(any, 0x8914, struct.pack('16sh14x', b'lo', int(sys.argv[1])))\n"
)
UP, DOWN = "1", "0"
THEN_RUN = f"{LINK}os.execvp(sys.argv[2], sys.argv[2:])\n"

CLIENT = """
import sys, threading
from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
client = connect(NbdUri.parse(sys.argv[1]))
client.read(0, 4096)
print("connected", file=sys.stderr, flush=True)
threading.Event().wait()
"""


def test_a_client_whose_host_does_not_answer_is_dropped(serve: Serve, children: Children, tmp_path: Path) -> None:
    image = tmp_path / "vda.img"
    make_image(image, MIB)
    alone = [require("unshare"), "--net", sys.executable, "-c", THEN_RUN, UP]
    # Whether the reply to the client's READ is acknowledged by then is chance: both must come to an end.
    server = serve(image, "--limit", "keepalive-seconds=2", "--limit", "send-seconds=1", wrapper=alone)
    inside = [require("nsenter"), "--target", str(server.child.pid), "--net", sys.executable, "-c"]
    client = children.start(*inside, CLIENT, server.uri(tcp=True), env={"PYTHONPATH": str(ROOT)})
    client.wait_for_line("connected")
    run(*inside, LINK, DOWN)
    server.child.wait_for_line(r"client 127\.0\.0\.1:\d+ left vda")
    assert server.status()["clients"] == []
