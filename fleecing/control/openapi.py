"""The API's routes, and the OpenAPI 3.1 document made of them and of their models."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

import fleecing
from fleecing.control.models import Problem

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SCHEMA = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Parameter:
    """A query parameter, or a header: a whole number of 0 or more, or text."""

    name: str
    description: str
    text: bool = False
    place: str = "query"


@dataclass(frozen=True)
class Route:
    """One call. `problems` are the statuses it fails with, besides 500; `answer` None = text of `content_type`."""

    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None
    status: int = 200
    query: tuple[Parameter, ...] = ()
    problems: tuple[int, ...] = ()
    content_type: str = "application/json"


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document as plain values."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Problem, "serialization")]
    for route in routes:
        if route.body is not None:
            models.append((route.body, "validation"))
        if route.answer is not None:
            models.append((route.answer, "serialization"))
    _, schemas = models_json_schema(models, ref_template=_SCHEMA)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fleecing control API",
            "version": fleecing.__version__,
            "description": "Spoken over a Unix socket that only the server's user may connect to.",
        },
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _operation(route: Route) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    for parameter in route.query:
        schema = {"type": "string"} if parameter.text else {"type": "integer", "minimum": 0}
        parameters.append(
            {"name": parameter.name, "in": parameter.place, "description": parameter.description, "schema": schema}
        )
    answer = _reference(route.answer) if route.answer is not None else {}
    responses = {
        str(route.status): {
            "description": HTTPStatus(route.status).phrase,
            "content": {route.content_type: {"schema": answer}},
        }
    }
    for status in (*route.problems, 500):
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": _reference(Problem)}},
        }
    operation: dict[str, Any] = {"summary": route.summary, "parameters": parameters, "responses": responses}
    if route.body is not None:
        content = {"application/json": {"schema": _reference(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _SCHEMA.format(model=model.__name__)}
