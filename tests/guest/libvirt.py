"""The guest under libvirt: it makes QEMU's command line of a domain's XML, as for any machine, and runs it.

`virt-qemu-run` is libvirt's own driver in one process: no daemon, and all files in a folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from tests.guest.guest import KERNEL_OPTIONS, Guest
from tests.guest.image import guest_image
from tests.peers import DEADLINE, Child

_DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{options}</cmdline>
  </os>
  <cpu mode='custom'><model>qemu64</model><feature policy='require' name='rdrand'/></cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <serial type='file'><source path='{console}'/></serial>
    <serial type='unix'><source mode='connect' path='{commands}'/></serial>
    <interface type='user'><model type='virtio'/><rom enabled='no'/></interface>
    {devices}
  </devices>
  {more}
</domain>
"""

_AS_A_USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
"""For root libvirt runs QEMU as a user that only the installation of the whole of it makes."""


class LibvirtGuest(Guest):
    """A running guest; `devices` go into <devices> of its domain, `more` behind it."""

    def __init__(self, folder: Path, devices: str, more: str = "") -> None:
        image = guest_image()
        self.console_path = folder / "console.log"
        self._pending = b""
        self._short = Path(tempfile.mkdtemp(prefix="fleecing-", dir="/tmp"))  # paths of sockets are short
        domain = folder / "web.xml"
        domain.write_text(
            _DOMAIN.format(
                kernel=image.kernel,
                initramfs=image.initramfs,
                options=KERNEL_OPTIONS,
                console=self.console_path,
                commands=self._short / "commands",
                devices=devices,
                more=more,
            )
        )
        listener = socket.socket(socket.AF_UNIX)
        with listener:
            listener.bind(str(self._short / "commands"))
            listener.listen(1)
            root = self._short / "libvirt"
            (root / "etc").mkdir(parents=True)
            (root / "etc" / "qemu.conf").write_text('stdio_handler = "file"\n')  # by default virtlogd is waited for
            run = ["virt-qemu-run", "--root", str(root), str(domain)]
            self.qemu = Child([*(_AS_A_USER if os.geteuid() == 0 else ()), *run], folder, env={"HOME": str(folder)})
            listener.settimeout(DEADLINE)
            try:
                self._commands, _ = listener.accept()
                self._read_until(b"guest ready\n", time.monotonic() + DEADLINE)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Libvirt is told to end, which cuts the guest's power: killed, it would leave QEMU behind."""
        if hasattr(self, "_commands"):
            self._commands.close()
        self.qemu.stop()
        shutil.rmtree(self._short, ignore_errors=True)
