"""Users and groups of this machine, by name or number. What is not known raises ValueError with a sentence."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field

MOST = 2**32 - 2
"""The highest number of a user or a group; the next one stands for nobody (chown(2))."""


def user_id(user: int | str) -> int:
    """The number of a user."""
    return _number("user", user, lambda name: pwd.getpwnam(name).pw_uid)


def group_id(group: int | str) -> int:
    """The number of a group."""
    return _number("group", group, lambda name: grp.getgrnam(name).gr_gid)


def _number(kind: str, given: int | str, look_up: Callable[[str], int]) -> int:
    """As chown(1) takes it: a name first of all, then a number."""
    if isinstance(given, int):
        return given
    try:
        return look_up(given)
    except KeyError:
        if given.isascii() and given.isdecimal() and int(given) <= MOST:
            return int(given)
        raise ValueError(f"there is no {kind} '{given}' on this machine: make it, or give its number") from None


def _known_user(user: int | str) -> int | str:
    user_id(user)
    return user


def _known_group(group: int | str) -> int | str:
    group_id(group)
    return group


_Id = Annotated[int, Field(strict=True, ge=0, le=MOST)]
_Word = Annotated[str, Field(strict=True, min_length=1)]

User = Annotated[_Id | _Word, AfterValidator(_known_user)]
Group = Annotated[_Id | _Word, AfterValidator(_known_group)]
