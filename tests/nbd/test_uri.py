"""NBD URIs (doc/uri.md)."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.nbd.uri import NbdUri


@pytest.mark.parametrize(
    "text, uri",
    [
        # the document's examples
        ("nbd://example.com:10809/export", NbdUri(host="example.com", export="export")),
        ("nbd+unix:///export?socket=nbd.sock", NbdUri(socket="nbd.sock", export="export")),
        ("nbd://example.com/disk", NbdUri(host="example.com", export="disk")),
        ("nbd+unix:///disk?socket=sock", NbdUri(socket="sock", export="disk")),
        ("nbd://example.com/", NbdUri(host="example.com")),
        ("nbd://example.com", NbdUri(host="example.com")),
        ("nbd://example.com//disk", NbdUri(host="example.com", export="/disk")),
        ("nbd://example.com/hello%20world", NbdUri(host="example.com", export="hello world")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri(socket="\0/abstract")),
        # and more
        ("nbds://h:1/", NbdUri(host="h", port=1, tls=True)),
        ("nbds://h/x?tls-certificates=/a/b", NbdUri(host="h", export="x", tls=True, tls_certificates="/a/b")),
        ("nbds+unix:///?socket=s&tls-hostname=h", NbdUri(socket="s", tls=True, tls_hostname="h")),
        ("nbd://[::1]:99/x", NbdUri(host="::1", port=99, export="x")),
        ("nbd:///x", NbdUri(host="localhost", export="x")),
        ("NBD://h/x", NbdUri(host="h", export="x")),
        ("nbd://h/vda@monday", NbdUri(host="h", export="vda@monday")),
        ("nbd://h/vda%40monday", NbdUri(host="h", export="vda@monday")),
        ("nbd://h/a+b", NbdUri(host="h", export="a+b")),
        ("nbd+unix:///?socket=/a+b", NbdUri(socket="/a+b")),
        ("nbd+unix:/x?socket=s", None),
        ("nbds://alice@h/?tls-type=psk&tls-verify-peer=1",
         NbdUri(host="h", tls=True, username="alice", tls_type="psk", tls_verify_peer=True)),
    ],
)  # fmt: skip
def test_uris_are_read(text: str, uri: NbdUri | None) -> None:
    if uri is None:
        with pytest.raises(ValueError, match="is no NBD URI"):
            NbdUri.parse(text)
    else:
        assert NbdUri.parse(text) == uri


@pytest.mark.parametrize(
    "uri, text",
    [
        (NbdUri(), "nbd://localhost/"),
        (NbdUri(host="h", port=1, export="vda@monday"), "nbd://h:1/vda@monday"),
        (NbdUri(host="::1", export="x"), "nbd://[::1]/x"),
        (NbdUri(socket="/run/fleecing/nbd.sock", export="vda"), "nbd+unix:///vda?socket=/run/fleecing/nbd.sock"),
        (NbdUri(socket="/a b&c", export="d?e#f"), "nbd+unix:///d%3Fe%23f?socket=/a%20b%26c"),
        (NbdUri(socket="s", tls=True, tls_verify_peer=False), "nbds+unix:///?socket=s&tls-verify-peer=0"),
        (NbdUri(host="h", export="$(reboot);'`"), "nbd://h/%24%28reboot%29%3B%27%60"),
        (NbdUri(socket=os.fsdecode(b"/tmp/\xff")), "nbd+unix:///?socket=/tmp/%FF"),
    ],
)
def test_uris_are_written(uri: NbdUri, text: str) -> None:
    assert str(uri) == text


@pytest.mark.parametrize(
    "text, why",
    [
        ("http://h/x", "scheme is none of"),
        ("/dev/sda", "scheme is none of"),
        ("", "scheme is none of"),
        ("nbd:h:10809:exportname=x", "'://' is missing"),
        ("nbd+unix:///x", "'socket=PATH' is missing"),
        ("nbd+unix:///x?socket=", "'socket=PATH' is missing"),
        ("nbd+unix://x?socket=s", "is a '/' missing"),
        ("nbd://h/x?socket=s", r"goes with the scheme nbd\+unix"),
        ("nbd://h/a#b", "%23"),
        ("nbd://h/a#", "%23"),
        ("nbd://h:99999/x", "[Pp]ort"),
        ("nbd://h:x/x", "[Pp]ort"),
        ("nbd://h:0/x", "port 0"),
        ("nbd://[::1/x", "IPv6"),
        ("nbd://h/x?frob=1", "'frob' is not known"),
        ("nbd+unix:///x?socket=a&socket=b", "twice"),
        ("nbd://h/x?tls-type=rot13", "anon, x509, psk"),
        ("nbd://h/x?tls-verify-peer=yes", "0, 1"),
        ("nbd://h/%ff", "not UTF-8"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/" + "x" * 4097, "4096"),
    ],
)
def test_what_is_no_uri_is_told_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        NbdUri.parse(text)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50)


@given(export=names, socket=names.filter(bool) | st.binary(min_size=1, max_size=50).map(os.fsdecode))
def test_what_is_written_for_a_socket_is_read_again(export: str, socket: str) -> None:
    uri = NbdUri(export=export, socket=socket)
    assert NbdUri.parse(str(uri)) == uri


@given(
    export=names,
    host=st.from_regex(r"[a-z0-9-]+(\.[a-z0-9-]+)*", fullmatch=True) | st.ip_addresses(v=6).map(str),
    port=st.integers(1, 65535),
    username=st.none() | names,
    tls=st.booleans(),
)
def test_what_is_written_for_tcp_is_read_again(
    export: str, host: str, port: int, username: str | None, tls: bool
) -> None:
    uri = NbdUri(export=export, host=host, port=port, username=username, tls=tls)
    assert NbdUri.parse(str(uri)) == uri


@given(text=st.text(max_size=60) | st.text(max_size=60).map(lambda rest: "nbd://" + rest))
def test_any_text_is_a_uri_or_a_value_error(text: str) -> None:
    try:
        uri = NbdUri.parse(text)
    except ValueError:
        return
    assert NbdUri.parse(str(uri)) == uri
