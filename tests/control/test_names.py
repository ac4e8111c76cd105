"""Names of disks and snapshots."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.control.names import NAME_PATTERN, check_name, clean_name, export_name, split_export


@pytest.mark.parametrize("name", ["a", "vda", "A.b_c-9", "_x", "0", "a" * 128, "a..b"])
def test_allowed_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-option", "a/b", "a@b", "a b", "a\n", "ä", "a\0", "a" * 129, "٣"]
)
def test_other_names_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        check_name(name)


@given(st.text())
def test_a_cleaned_name_is_allowed(text: str) -> None:
    assert re.fullmatch(NAME_PATTERN, clean_name(text))


@pytest.mark.parametrize(
    "text, name", [("vda", "vda"), ("My disk (2)", "My-disk-2"), ("...", "disk"), ("--x", "x"), ("x" * 200, "x" * 128)]
)
def test_a_file_name_becomes_the_nearest_name(text: str, name: str) -> None:
    assert clean_name(text) == name


def test_an_export_name_splits_into_what_it_was_made_of() -> None:
    assert split_export(export_name("vda", "monday")) == ("vda", "monday")


@pytest.mark.parametrize("text", ["vda", "vda@", "@monday", "vda@a@b", "vd a@b"])
def test_what_names_no_snapshot_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no name|names no snapshot"):
        split_export(text)
