"""The control API, by its own OpenAPI document: calls that it allows, nearly allows, or has never heard of.

Made here, in a hundred lines, of the few things that the document says; schemathesis brings thirty packages for them.
"""

from __future__ import annotations

import http.client
import json
import socket
import string
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

from scripts.fuzzing.damage import values
from scripts.fuzzing.target import Case, Finding
from tests.fuzz.field import MEMORY, Field, Witness

SIZE = 1 << 20
SECONDS = 20.0
_PARAMETERS = {
    "disk": ["vda", "other", "nosuch", "", "a/b", "\0", "ü", "x" * 300, ".."],
    "name": ["s", "w", "n1", "c1", "nosuch", "", "%2F", "\n", "x" * 300],
    "id": ["1", "0", "-1", "nosuch", "9" * 5000],
    "offset": ["0", "65536", "1", "-1", "x", "9" * 30, "9" * 5000, "1e3", "", "٣"],
    "limit": ["0", "1", "100000", "-1", "x", "9" * 30],
}
_WORDS = ["vda", "other", "vda@s", "n1", "n2", "c1", "c2", "", "64K", "10G", "9" * 5000, "\0", "x" * 300]
_NO_PATHS = ["/", "/v1", "/v1/snapshots/vda@", "/v1/snapshots/a@b@c", "/v1/../x", "/metrics?x", "//"]


def _of_schema(schema: Mapping[str, Any], document: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema allows for the most part: of its types and enumerations, in ranges of their own."""
    if "$ref" in schema:
        return _of_schema(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    for key in ("anyOf", "allOf", "oneOf"):
        if key in schema:
            return st.one_of([_of_schema(part, document) for part in schema[key]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([_of_schema({**schema, "type": one}, document) for one in kind])
    if kind == "object":
        wanted = {name: _of_schema(part, document) for name, part in schema.get("properties", {}).items()}
        needed = {name: wanted[name] for name in schema.get("required", [])}
        return st.fixed_dictionaries(needed, optional={name: s for name, s in wanted.items() if name not in needed})
    if kind == "array":
        return st.lists(_of_schema(schema.get("items", {}), document), max_size=3)
    plain: dict[object, st.SearchStrategy[Any]] = {
        "string": st.sampled_from(_WORDS) | st.text(max_size=20),
        "integer": st.integers(-2, 2**21) | st.integers(),
        "number": st.floats(0, 90) | st.floats(),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return plain.get(kind, values)


class Control:
    """A real server's control socket."""

    def __init__(self, folder: Path) -> None:
        self._field = Field(folder, SIZE)
        self._witness = Witness(self._field)
        self._witness.__enter__()
        # What a job is told to write lies here and nowhere else.
        self._targets = [str(folder / "t1"), str(folder / "t2"), "/nonexistent/x", "", "\0", "nbd+unix:///x?socket=/no"]
        self._document = json.loads(self._call("GET", "/openapi.json", None)[1])
        self._log = self._field.server.control.request("GET", "/v1/log")
        del self._log["format"]
        calls = [(path, verb) for path, verbs in self._document["paths"].items() for verb in verbs]
        known = st.sampled_from(calls).flatmap(lambda call: self._of(*call))
        self.cases: st.SearchStrategy[Case] = known | st.fixed_dictionaries(
            {
                "path": st.sampled_from(_NO_PATHS),
                "verb": st.sampled_from(["get", "put", "delete", "options", "head", "patch"]),
                "body": st.none() | st.binary(max_size=20),
                "words": st.just({}),
            }
        )

    def _of(self, path: str, verb: str) -> st.SearchStrategy[Case]:
        operation = self._document["paths"][path][verb]
        words: dict[str, dict[str, st.SearchStrategy[str]]] = {"path": {}, "query": {}, "header": {}}
        for parameter in operation["parameters"]:
            name, place = parameter["name"], parameter["in"]
            text = st.text(string.printable[:95], max_size=10) if place == "header" else st.text(max_size=10)
            words[place][name] = st.sampled_from(_PARAMETERS.get(name, _PARAMETERS["offset"][:-1])) | text
        given = st.fixed_dictionaries(words["path"], optional=words["query"] | words["header"])
        body: st.SearchStrategy[Any] = st.none()
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            documents = (_of_schema(schema, self._document) | values).map(partial(_within, targets=self._targets))
            body = st.one_of(
                documents.map(lambda content: json.dumps(content).encode()),
                st.binary(max_size=50),
                st.sampled_from([b"", b"[" * 200_000, b"{}" * 10, b'{"disks": ["vda"]' + b" " * 2_000_000]),
            )
        return st.fixed_dictionaries({"path": st.just(path), "verb": st.just(verb), "words": given, "body": body})

    def run(self, case: Case) -> None:
        path, words = case["path"], case["words"]
        if case["verb"] == "delete" and (words.get("disk"), words.get("name")) == ("other", "w"):
            return  # the witnesses' own
        operation = self._document["paths"].get(path, {}).get(case["verb"])
        for name, word in words.items():
            path = path.replace(f"{{{name}}}", quote(word, safe="", errors="replace"))
        places = {p["name"]: p["in"] for p in operation["parameters"]} if operation else {}
        query = "&".join(f"{n}={quote(w, errors='replace')}" for n, w in words.items() if places[n] == "query")
        headers = {name: word for name, word in words.items() if places[name] == "header"}
        status, content = self._call(case["verb"].upper(), f"{path}?{query}", case["body"], headers)
        allowed = {int(s) for s in operation["responses"]} - {500} if operation else {200, 404, 405}
        # 413: a body that is too long; 404 and 405: a word that makes it another path.
        if status not in allowed | {400, 404, 405, 413}:
            raise Finding(f"{case['verb']} {path[:200]} is answered with {status}: {content[:300]!r}")
        if status >= 400 and case["verb"] != "head":
            if not _sentence(content):
                raise Finding(f"{status} without a sentence: {content[:300]!r}")
        elif operation:
            kinds = operation["responses"][str(status)]["content"]
            if "application/json" in kinds:
                self._check(json.loads(content), kinds["application/json"]["schema"])
        self._tidy()

    def _check(self, answer: Any, schema: Mapping[str, Any]) -> None:
        """All that the document requires is there."""
        if "$ref" in schema:
            schema = self._document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        if isinstance(answer, dict):
            if missing := set(schema.get("required", [])) - set(answer):
                raise Finding(f"the answer lacks {missing}")
            for name, part in schema.get("properties", {}).items():
                self._check(answer.get(name), part)
        elif isinstance(answer, list):
            for item in answer:
                self._check(item, schema.get("items", {}))

    def _tidy(self) -> None:
        """Back to the two snapshots of the start, and nothing of the others noticed anything."""
        server = self._field.server
        status = server.status()
        for job in server.control.request("GET", "/v1/jobs")["jobs"]:
            if job["state"] == "running":
                server.control.request("DELETE", f"/v1/jobs/{job['id']}")
        for snapshot in status["snapshots"]:
            if snapshot["export"] not in ("vda@s", "other@w"):
                server.delete(snapshot["export"])
        for disk in status["disks"]:
            for checkpoint in server.checkpoints(disk["name"]):
                server.delete_checkpoint(f"{disk['name']}@{checkpoint['name']}")
        server.control.request("PATCH", "/v1/log", self._log)
        for target in self._targets[:2]:
            Path(target).unlink(missing_ok=True)
        self._witness.check()
        self._field.check()
        if self._field.peak > MEMORY:
            raise Finding(f"the server has {self._field.peak >> 20} MiB")

    def _call(
        self, verb: str, path: str, body: bytes | None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = _UnixConnection(str(self._field.server.control_path))
        try:
            connection.request(verb, path, body, headers or {})
            response = connection.getresponse()
            endless = response.headers.get_content_type() == "text/event-stream"
            return response.status, b"" if endless else response.read()
        finally:
            connection.close()

    def close(self) -> None:
        """The server is well, and so are the others."""
        try:
            self._field.check()
            self._witness.__exit__()
        finally:
            self._field.server.kill()


def _within(content: Any, targets: list[str]) -> Any:
    """The same; whatever a job would write lies where it may."""
    if isinstance(content, dict) and "target" in content:
        return content | {"target": targets[len(str(content["target"])) % len(targets)]}
    return content


def _sentence(content: bytes) -> bool:
    """Whether it is what the document calls a Problem, with words in it."""
    try:
        return bool(json.loads(content)["error"].strip())
    except (ValueError, KeyError, TypeError):
        return False


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._path)
