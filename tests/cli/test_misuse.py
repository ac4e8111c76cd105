"""Misuse: one sentence on stderr, nothing on stdout, exit code 2, before any server is asked."""

from __future__ import annotations

import shlex

import pytest
from click.testing import CliRunner, Result

from fleecing.cli.main import main


def fleecing(*words: str) -> Result:
    return CliRunner().invoke(main, ["--help"] if not words else list(words))


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("serve", "Name the IMAGE to serve"),
        ("serve a b", "unexpected extra argument"),
        ("serve a --config b", "do not go with --config"),
        ("serve --name a --config b", "do not go with --config"),
        ("serve a --name ../b", "'../b' is no name"),
        ("serve a --name -b", "'-b' is no name"),
        ("serve a --cluster-size 3K", "cluster size 3 KiB is not possible"),
        ("serve a --cluster-size big", "'big' is no size"),
        ("serve a --listen here:there", "'here:there' is no HOST:PORT"),
        ("serve a --unix " + "x" * 120, "the system allows 107"),
        ("serve a --control " + "x" * 120, "the system allows 107"),
        ("snapshot create", "Missing argument 'DISK...'"),
        ("snapshot create a@b", "'a@b' is no name"),
        ("snapshot create a a", "DISK 'a' is named twice"),
        ("snapshot create a --name " + "x" * 129, "letters, digits"),
        ("snapshot create a --temp-limit 1Z", "'1Z' is no size"),
        ("snapshot create a --temp-limit 0", "temp limit 0"),
        ("snapshot create a --cbw-timeout -1", "-1"),
        ("snapshot create a --cbw-timeout nan", "nan"),
        ("snapshot create a --on-cbw-error panic", "panic"),
        ("snapshot create a --read-once --read-once-grace lots", "'lots' is no size"),
        ("snapshot create a --read-once-grace 1M", "--read-once-grace goes with --read-once only"),
        ("snapshot show a", "'a' names no snapshot"),
        ("snapshot delete", "Missing argument"),
        ("snapshot delete a@b c", "'c' names no snapshot"),
        ("map a@b@c", "'b@c' is no name"),
        ("status --interval 0", "0"),
        ("status --control " + "x" * 120, "the system allows 107"),
        ("pull vda copy", "'vda' names no snapshot"),
        ("pull http://x/y copy", "is no NBD URI"),
        ("pull a@b nbd://:0/x", "is no NBD URI"),
        ("pull a@b copy --bitmap x --no-bitmap", "do not go together"),
        ("pull a@b copy --compress zstd", "goes with the format qcow2"),
        ("pull a@b copy.qcow2 --existing", "is for new files"),
        ("pull a@b copy --bandwidth 0", "never come to an end"),
        ("job set 1", "Missing option '--bandwidth'"),
        ("job set 1 --bandwidth 0", "never come to an end"),
        ("pull a@b dir --chain --existing", "--existing does not go with --chain"),
        ("pull a@b dir --chain --format raw", "--format raw does not go with --chain"),
        ("restore x", "Missing argument 'TARGET'"),
        ("restore x ''", "Invalid value for 'TARGET': is empty"),
        ("pull a@b ''", "Invalid value for 'TARGET': is empty"),
        ("pull a@b '' --chain", "Invalid value for 'TARGET': is empty"),
        ("push a ''", "Invalid value for 'TARGET': is empty"),
        ("backup a ''", "Invalid value for 'DIR': is empty"),
        ("prune x", "Missing option '--keep'"),
        ("prune x --keep 0", "0"),
        ("backup vda", "Missing argument"),
        ("backup vda vda dir", "DISK 'vda' is named twice"),
        ("backup a@b dir", "'a@b' is no name"),
        ("nosuch", "No such command 'nosuch'"),
    ],
)
def test_misuse_is_told_with_exit_code_2(command: str, sentence: str) -> None:
    result = fleecing(*shlex.split(command))
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


@pytest.mark.parametrize(
    "command",
    ["", "serve", "check-config", "snapshot", "snapshot create", "snapshot list", "snapshot show", "snapshot delete"]
    + ["status", "map", "disk", "disk list", "pull", "backup", "points", "verify", "restore", "prune"],
)
def test_every_command_explains_itself(command: str) -> None:
    result = fleecing(*command.split(), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")
