"""The OpenAPI schema: bodies that routes read themselves are described here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter

REFERENCE = "#/components/schemas/{model}"
PICTURES = ("image/png", "image/jpeg", "image/webp")
MASKS = ("image/png", "image/webp")
"""Media types of images that may be transparent."""
METHODS = ("get", "post", "put", "patch", "delete")


def takes(model: type[BaseModel] | TypeAdapter[Any]) -> dict[str, Any]:
    """Return what a route says of its JSON body.

    Args:
        model: that the route reads the body with.
    """
    if isinstance(model, TypeAdapter):
        schema = model.json_schema(ref_template=REFERENCE)
    else:
        schema = model.model_json_schema(ref_template=REFERENCE)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def takes_file(*kinds: str) -> dict[str, Any]:
    """Return what a route says of its body that is a file of one of these media types."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": dict.fromkeys(kinds, binary)}}


def takes_form(model: type[BaseModel], files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return what a route says of its body that is a form.

    Args:
        model: of the fields.
        files: fields that are files -> media types that they take; the first one must be there.
    """
    schema = model.model_json_schema(ref_template=REFERENCE)
    # As OpenAPI 3.1 has it. `format: binary` was that of 3.0, and generators of requests make values of it that no
    # JSON schema can judge, which they have to do with the fields beside it.
    part = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema["properties"] |= dict.fromkeys(files, part)
    schema["required"] = [*schema.get("required", ()), next(iter(files))]
    encoding = {name: {"contentType": ", ".join(kinds)} for name, kinds in files.items()}
    content = {"multipart/form-data": {"schema": schema, "encoding": encoding}}
    return {"requestBody": {"required": True, "content": content}}


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The images; with `stream` as server-sent events.", "content": {"text/event-stream": {}}}
}
"""What a route says of its answer that is a stream where the request asks for one; JSON is documented beside it."""


def files(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """Return what a route says of its answer that is a file of one of some media types."""
    return {200: {"description": "The file.", "content": {name: {} for name in media_types}}}


def openapi(app: FastAPI, public: Collection[str] = ()) -> dict[str, Any]:
    """Return the schema of a server, complete in itself.

    Args:
        app: the server.
        public: paths that need no token.
    """
    schema = app.openapi()
    shared = schema.setdefault("components", {}).setdefault("schemas", {})
    for name, path in schema["paths"].items():
        for method in path.keys() & METHODS:
            for content in path[method].get("requestBody", {}).get("content", {}).values():
                shared |= content.get("schema", {}).pop("$defs", {})
            _add_errors(path[method])
            if name in public:
                path[method]["security"] = []
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}]
    return schema


def _add_errors(operation: dict[str, Any]) -> None:
    """Describe the one form that all errors have."""
    text = {"type": "string"}
    fields = {"message": text, "type": text, "code": text, "param": {"type": ["string", "null"]}}
    error = {"type": "object", "properties": fields, "required": ["message", "code"]}
    body = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    said = {"description": "What is wrong.", "content": {"application/json": {"schema": body}}}
    operation["responses"] = {**operation.get("responses", {}), "422": said, "4XX": said, "5XX": said}
