"""What the guest boots from: Debian's cloud kernel, and an initramfs made of this machine's own programs.

In .cache/guest of the project:
    linux-image-*.deb    downloaded once, by `python -m tests.guest.image`, and never installed: its hooks would
                         change the host
    KEY/                 vmlinuz and initramfs, made of it without a network, again when what goes in has changed
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.peers import require

KERNEL_PACKAGE = "linux-image-cloud-amd64"  # a name without a version, which depends on the present one
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "nbd")
PROGRAMS = {
    "bin/busybox": "busybox",
    # Names that busybox has not: its shell takes its own mke2fs, which makes ext2, before any file.
    "sbin/mkfs.ext4": "mke2fs",
    "sbin/fsck.ext4": "e2fsck",
    "sbin/nbd-client": "nbd-client",
    "sbin/qemu-ga": "qemu-ga",
}
SCRIPTS = ("init", "agent")

_HERE = Path(__file__).parent
_CACHE = _HERE.parent.parent / ".cache" / "guest"


class Image(NamedTuple):
    """The two files that QEMU loads."""

    kernel: Path
    initramfs: Path


def guest_image() -> Image:
    """The image, built now where it is out of date. The test fails where the kernel was never downloaded."""
    with _locked():
        package = _downloaded()
        if package is None:
            pytest.fail("the guest's kernel is missing: ./scripts/test downloads it with apt-get", pytrace=False)
        folder = _CACHE / _key(package)
        if not folder.exists():
            _forget_all_but(package)
            _build(package, folder)
    return Image(folder / "vmlinuz", folder / "initramfs")


def download_kernel() -> None:
    """Fetch the kernel's package, unless it is there; needs apt's lists, but no root. Raises CalledProcessError."""
    with _locked():
        if _downloaded() is not None:
            return
        depends = subprocess.run(
            ["apt-cache", "depends", KERNEL_PACKAGE], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
        ).stdout
        match = re.search(r"Depends: (linux-image-\S+)", depends)
        if match is None:
            sys.exit(f"apt knows no {KERNEL_PACKAGE}: run apt-get update")
        with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
            # apt would drop to a user that may not write here
            command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download"]
            subprocess.run([*command, match[1]], cwd=folder, stdin=subprocess.DEVNULL, check=True)
            (package,) = Path(folder).glob("*.deb")
            package.rename(_CACHE / package.name)


@contextmanager
def _locked() -> Iterator[None]:
    """Of several test runs at once, one prepares and the others wait."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _downloaded() -> Path | None:
    return max(_CACHE.glob("linux-image-*.deb"), default=None)


def _key(package: Path) -> str:
    """A name for all that goes into the image: another one where a program of the host was upgraded."""
    parts = [package.name, Path(__file__).read_text(), *((_HERE / name).read_text() for name in SCRIPTS)]
    for program in PROGRAMS.values():
        state = Path(require(program)).stat()
        parts.append(f"{program} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _forget_all_but(package: Path) -> None:
    for path in _CACHE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != package and path.suffix == ".deb":
            path.unlink()


def _build(package: Path, folder: Path) -> None:
    """Make FOLDER, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=_CACHE) as work:
        unpacked, root, made = Path(work, "package"), Path(work, "root"), Path(work, "made")
        subprocess.run([require("dpkg-deb"), "-x", str(package), str(unpacked)], check=True)
        made.mkdir()
        (kernel,) = unpacked.glob("boot/vmlinuz-*")
        kernel.rename(made / "vmlinuz")
        _copy_modules(unpacked / "lib" / "modules", root / "modules")
        _copy_programs(root)
        for name in SCRIPTS:
            shutil.copy(_HERE / name, root / name)
            (root / name).chmod(0o755)
        _pack(root, made / "initramfs")
        made.rename(folder)


def _copy_modules(source: Path, target: Path) -> None:
    """The modules and all that they depend on, with their order of loading in the file `order`."""
    target.mkdir(parents=True)
    found = {path.stem.replace("-", "_"): path for path in source.rglob("*.ko")}
    order: list[str] = []

    def add(name: str) -> None:
        path = found[name]
        if path.name in order:
            return
        content = path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", content)  # of the section .modinfo
        for needed in depends[1].decode().split(",") if depends is not None else ():
            if needed:
                add(needed.replace("-", "_"))
        order.append(path.name)
        (target / path.name).write_bytes(content)

    for name in MODULES:
        add(name)
    (target / "order").write_text("".join(f"{name}\n" for name in order))


def _copy_programs(root: Path) -> None:
    """The programs, and the shared libraries that they are linked with."""
    for name, program in PROGRAMS.items():
        source = require(program)
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, root / name)
        copy_libraries(source, root)


def copy_libraries(program: str, root: Path) -> None:
    """What a program or library of the host is linked with, at the path that the loader looks for."""
    linked = subprocess.run([require("ldd"), program], capture_output=True, text=True, check=False).stdout
    for library in re.findall(r"(/\S+) \(0x", linked):
        target = root / library[1:]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)


def _pack(root: Path, target: Path) -> None:
    names = "".join(f"{path.relative_to(root)}\0" for path in sorted(root.rglob("*")))
    with target.open("wb") as out:
        subprocess.run(
            [require("cpio"), "-o", "-0", "-H", "newc", "--quiet", "-R", "0:0"],
            cwd=root,
            input=names.encode(),
            stdout=out,
            check=True,
        )


if __name__ == "__main__":
    try:
        download_kernel()
        guest_image()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} failed with exit code {error.returncode}")
