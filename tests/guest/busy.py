"""A guest whose file system never rests, and the proof on the host of what a disk of it holds.

    work = BusyGuest(guest)                     # rounds of new files, overwrites and deletions, in the background
    made = make_files(guest)                    # names and checksums of files that are durable
    synced = work.wait_for(3)                   # and so is all that was done up to this round
    ...freeze the disk...
    now = change_files(guest)                   # all of `made` is changed
    assert_files(frozen, tmp_path / "files", made, synced)

The file system is ext4, mounted on /mnt of the guest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.peers import describe, run, run_any

# The content of new/N is known from N. What an odd round made is deleted two rounds later, the rest stays.
_ROUNDS = """
mkdir -p /mnt/new
n=0
while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    seq $n $((n + 3000)) | dd of=/mnt/new/$n conv=fsync
    dd if=/dev/urandom of=/mnt/overwritten bs=4k count=8 seek=$((n * 37 % 200)) conv=notrunc
    if [ $((n % 2)) = 1 ]; then rm -f /mnt/new/$((n - 2)); fi
    if [ -e /tmp/trim -a $((n % 5)) = 0 ]; then fstrim /mnt; fi
    echo "round $n" >&3
done
"""

_TELL = "echo exit code $n after round $last; exit 1"

_MAKE = """
for i in 1 2 3 4 5 6; do head -c $((i * 61234)) /dev/urandom >$i; done
sync
sha256sum *
"""

_CHANGE = """
dd if=/dev/urandom of=1 bs=1k count=30 seek=3 conv=notrunc 2>/dev/null
rm 2
truncate -s 100 3
echo more >>4
head -c 100000 /dev/urandom >5.new
mv 5.new 5
mv 6 7
sync
sha256sum *
"""


def make_files(guest: Guest) -> dict[str, str]:
    """Make files in /mnt/made; their SHA-256 by name. They are durable when this returns."""
    return _by_name(guest.check(f"mkdir -p /mnt/made && cd /mnt/made &&{_MAKE}"))


def change_files(guest: Guest) -> dict[str, str]:
    """Change all that `make_files` made: overwrite in place, delete, cut, append, replace, rename. It returns alike."""
    return _by_name(guest.check(f"cd /mnt/made &&{_CHANGE}"))


def _by_name(sums: str) -> dict[str, str]:
    return {name: checksum for checksum, name in (line.split() for line in sums.splitlines())}


class BusyGuest:
    """Work on /mnt in the background of the guest, in rounds; a round that it has told of is durable."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._round = 0
        guest.check(f"cat >/tmp/rounds.sh <<'END'\n{_ROUNDS}END\nmkfifo /tmp/rounds")
        # A pipe that nobody has open forgets what is in it, and one without a writer ends: so one process holds it.
        guest.check("sleep 9999 <>/tmp/rounds >/dev/null 2>&1 &")
        guest.check("(sh -e /tmp/rounds.sh 2>/tmp/rounds.log; echo end $? >&3) 3>/tmp/rounds >/dev/null 2>&1 &")

    def wait_for(self, rounds: int) -> int:
        """Wait until that many more rounds are durable, from now on; the number of the last one."""
        self._guest.check("echo now 0 >/tmp/rounds")
        return self._read(f"now) until=$((last + {rounds}));;", f"end) {_TELL}")

    def trim_too(self) -> None:
        """Trim the file system every few rounds from now on; the first time, that is all its free space."""
        self._guest.check("touch /tmp/trim")

    def stop(self) -> int:
        """End the work, which must not have failed; the number of its last round."""
        self._guest.check("touch /tmp/stop")
        return self._read(f"end) until=$last; [ $n = 0 ] || {{ {_TELL}; }}")

    def _read(self, *cases: str) -> int:
        """Read what the work tells, in the order in which it was told, until round `until` is among it."""
        script = (
            f"last={self._round}; until=; while read -r word n; do case $word in round) last=$n;; {' '.join(cases)};; "
            'esac; [ "$until" ] && [ $last -ge $until ] && echo $last && exit; done </tmp/rounds'
        )
        code, output = self._guest.run(script)
        if code:
            pytest.fail(f"the guest's work failed, {output}\n{self._guest.run('tail /tmp/rounds.log').output}")
        self._round = int(output)
        return self._round


def replay_journal(image: Path) -> None:
    """Do what mounting does after a crash; the test fails where more than that must be repaired."""
    result = run_any("e2fsck", "-p", str(image))
    if result.returncode not in (0, 1) or "recovering journal" not in result.stdout:
        pytest.fail(f"{describe(result)}: expected the journal to be replayed and nothing else")


def assert_files(image: Path, folder: Path, made: Mapping[str, str], synced: int) -> None:
    """The ext4 file system in `image` is whole and holds these files, and all of the rounds up to `synced`.

    Whole means that there is no journal to replay, either. All files are copied to `folder`, which is made; nothing is
    mounted for that.
    """
    run("e2fsck", "-fn", str(image))
    folder.mkdir()
    run("debugfs", "-R", f"rdump / {folder}", str(image))
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "made").iterdir()} == made
    for n in range(2, synced + 1, 2):
        lines = b"".join(b"%d\n" % i for i in range(n, n + 3001))
        assert (folder / "new" / str(n)).read_bytes() == lines, f"new/{n} of {synced}"
