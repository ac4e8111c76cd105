"""The messages of option haggling: struct and construct agree, and what is made can be cut again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.nbd import layouts, options
from fleecing.nbd.constants import IHAVEOPT, NBDMAGIC, Info, Opt, Rep
from fleecing.nbd.options import BlockSizes, OptionError

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300)
u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


def test_the_magics_spell_what_the_document_says() -> None:
    assert options.GREETING.pack(NBDMAGIC, IHAVEOPT, 3) == b"NBDMAGICIHAVEOPT\0\3"


@given(flags=u16)
def test_greeting_agrees(flags: int) -> None:
    assert options.GREETING.pack(NBDMAGIC, IHAVEOPT, flags) == layouts.GREETING.build({"handshake_flags": flags})


@given(flags=u32)
def test_client_flags_agree(flags: int) -> None:
    assert options.CLIENT_FLAGS.pack(flags) == layouts.CLIENT_FLAGS.build({"client_flags": flags})


@given(number=u32, data=st.binary(max_size=100))
def test_options_agree(number: int, data: bytes) -> None:
    assert options.option(number, data) == layouts.OPTION.build({"option": number, "data": data})


@given(number=u32, reply=st.sampled_from(Rep), data=st.binary(max_size=100))
def test_option_replies_agree(number: int, reply: Rep, data: bytes) -> None:
    expected = layouts.OPTION_REPLY.build({"option": number, "reply": int(reply), "data": data})
    assert options.option_reply(number, reply, data) == expected


@given(size=u64, flags=u16)
def test_export_name_answers_agree(size: int, flags: int) -> None:
    packed = options.EXPORT_NAME_ANSWER.pack(size, flags)
    fields = {"size": size, "transmission_flags": flags}
    assert packed == layouts.EXPORT_NAME_ANSWER.build(fields)
    assert packed + bytes(124) == layouts.EXPORT_NAME_ANSWER_WITH_ZEROES.build(fields)


@given(name=names, items=st.lists(u16, max_size=20))
def test_info_requests_agree(name: str, items: list[int]) -> None:
    data = options.info_request(name, items)
    assert data == layouts.INFO_REQUEST.build({"name": name.encode(), "items": items})
    assert options.parse_info_request(data) == (name, tuple(items))


@given(name=names, queries=st.lists(names, max_size=10))
def test_meta_queries_agree(name: str, queries: list[str]) -> None:
    data = options.meta_query(name, queries)
    raw = [query.encode() for query in queries]
    assert data == layouts.META_QUERY.build({"name": name.encode(), "queries": raw})
    assert options.parse_meta_query(data) == (name, tuple(queries))


@given(name=names, description=names)
def test_server_items_agree(name: str, description: str) -> None:
    data = options.server_item(name, description)
    assert data == layouts.SERVER_ITEM.build({"name": name.encode(), "description": description.encode()})
    assert options.parse_server_item(data) == (name, description)


@given(number=u32, name=names)
def test_meta_context_items_agree(number: int, name: str) -> None:
    data = options.meta_context_item(number, name)
    assert data == layouts.META_CONTEXT_ITEM.build({"id": number, "name": name.encode()})
    assert options.parse_meta_context_item(data) == (number, name)


@given(size=u64, flags=u16)
def test_export_items_agree(size: int, flags: int) -> None:
    data = options.info_export(size, flags)
    item = {"size": size, "transmission_flags": flags}
    assert data == layouts.INFO_ITEM.build({"type": int(Info.EXPORT), "item": item})
    assert options.info_type(data) == Info.EXPORT
    assert options.parse_info_export(data) == (size, flags)


@given(minimum=u32, preferred=u32, maximum=u32)
def test_block_size_items_agree(minimum: int, preferred: int, maximum: int) -> None:
    sizes = BlockSizes(minimum, preferred, maximum)
    data = options.info_block_size(sizes)
    item = {"minimum": minimum, "preferred": preferred, "maximum_payload": maximum}
    assert data == layouts.INFO_ITEM.build({"type": int(Info.BLOCK_SIZE), "item": item})
    assert options.parse_info_block_size(data) == sizes


@given(item=st.sampled_from([Info.NAME, Info.DESCRIPTION]), text=names)
def test_string_items_agree(item: Info, text: str) -> None:
    data = options.info_string(item, text)
    assert data == layouts.INFO_ITEM.build({"type": int(item), "item": text.encode()})
    assert options.parse_info_string(data) == text


def again(data: bytes, kind: str) -> bytes | None:
    """What the data means, made again; None where it is refused."""
    try:
        if kind == "info":
            return options.info_request(*options.parse_info_request(data))
        return options.meta_query(*options.parse_meta_query(data))
    except OptionError:
        return None


@given(
    data=st.binary(max_size=40),
    name=names,
    kind=st.sampled_from(["info", "meta"]),
    at=st.integers(0, 400),
    byte=st.integers(0, 255),
)
def test_damaged_data_is_refused_or_means_what_would_be_made_again(
    data: bytes, name: str, kind: str, at: int, byte: int
) -> None:
    sound = options.info_request(name, [0, 3]) if kind == "info" else options.meta_query(name, ["base:", ""])
    assert again(sound, kind) == sound
    for damaged in (data, sound[:at] + data, sound[:at] + bytes([byte]) + sound[at + 1 :]):
        assert again(damaged, kind) in (None, damaged)


@pytest.mark.parametrize("number, name", [(Opt.GO, "GO"), (77, "option 77")])
def test_options_have_names_for_the_log(number: int, name: str) -> None:
    assert options.option_name(number) == name
