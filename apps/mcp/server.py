"""The MCP server: Gradio's, over a page of its own that nobody sees, with one address and nothing else.

What Gradio would do beside it is not done here. The page is not mounted, so there are no routes for uploads, files,
its queue or its schema, and no page for browsers. No tool waits in Gradio's queue: queued tools are called by one HTTP
client whose address comes from the Host header of the first caller, with all headers of each caller. No tool takes a
file, which could be named by an address or a path of the machine. Images are answered by `apps.mcp.answers`, because
Gradio would copy them and tell where the copies are.

Who asks is known by the guard before (`apps.api.guards`): Host and Origin are checked there, and the token, if there
are users; a cookie is not enough here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.mcp import GradioMCPServer
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from apps.api.guards import Refusal
from apps.mcp.answers import Answer, content
from apps.mcp.tools import MAX_WAIT_SECONDS, Tools
from apps.service import limits
from apps.service.engine import Engine
from apps.service.requests import TextToImageRequest, explain
from apps.service.validation import accepted
from dit import __version__

PATH = "/mcp"
"""Where it is; a slash may follow."""
INSTRUCTIONS = (
    "Generates images and videos from text on the user's own machine. list_models says what there is. What takes "
    "longer than wait_seconds is a job: ask job_status for it."
)
SIDE = {"minimum": limits.MIN_SIDE, "maximum": limits.MAX_SIDE, "multipleOf": limits.SIDE_MULTIPLE}
OWN = {
    "wait_seconds": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS},
    "seconds": {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": limits.MAX_FRAMES}, {"type": "null"}]},
    "width": {"anyOf": [{"type": "integer", **SIDE}, {"type": "null"}]},
    "height": {"anyOf": [{"type": "integer", **SIDE}, {"type": "null"}]},
    "upscale": {"type": "integer", "minimum": 2, "maximum": limits.MAX_UPSCALE},
    "job_id": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    "name": {"type": "string", "maxLength": 140},
}
"""JSON schemas of arguments that are no options, or whose range is not in that of the option."""


class MissingMcpError(ImportError):
    """The package `mcp` is missing, or is another than Gradio's server needs."""


class ToolServer(GradioMCPServer):
    """Gradio's server of tools, with schemas and errors of our requests and our own answers.

    Args:
        blocks: has the tools as its functions.
        tools: the same.

    Raises:
        MissingMcpError: it names the extra.
    """

    def __init__(self, blocks: gr.Blocks, tools: Tools) -> None:
        if find_spec("mcp") is None or not hasattr(GradioMCPServer, "StreamableHTTPSessionManager"):
            raise MissingMcpError("--mcp needs the package mcp, before its version 2: pip install 'tessera[mcp]'")
        self._options = TextToImageRequest.model_json_schema()["properties"]
        super().__init__(blocks)
        tools.report = self._report

    def create_mcp_server(self) -> Any:
        """Return the server, which checks arguments as requests are checked, before it checks them by the schema."""
        from mcp import types

        server = super().create_mcp_server()
        server.version, server.instructions = __version__, INSTRUCTIONS
        call = server.request_handlers[types.CallToolRequest]

        async def checked(asked: types.CallToolRequest) -> types.ServerResult:
            wrong = self.wrong_arguments(asked.params.name, asked.params.arguments or {})
            if wrong:
                text = types.TextContent(type="text", text=wrong)
                return types.ServerResult(types.CallToolResult(content=[text], isError=True))
            return await call(asked)

        server.request_handlers[types.CallToolRequest] = checked
        return server

    def wrong_arguments(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Say what is wrong with the arguments of a tool, in the words of all other front ends; empty for nothing."""
        if tool not in self.tool_to_endpoint:
            return f"There is no such tool; choose among {', '.join(self.tool_to_endpoint)}."
        known = self.get_input_schema(tool)[0]["properties"]
        unknown = [str(name)[:40] for name in arguments if name not in known]
        if unknown:
            return f"{unknown[0]!a}: {tool} has no such setting; leave it out"
        if tool.startswith("generate"):
            values = {name: value for name, value in arguments.items() if name in self._options and value is not None}
            try:
                TextToImageRequest.model_validate(values)
            except ValidationError as error:
                return explain(error)
        return self._outside(tool, arguments)

    def _outside(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Say which argument is outside the schema of a tool, without repeating it; empty for none."""
        from jsonschema import Draft202012Validator

        schema, _ = self.get_input_schema(tool)
        for error in Draft202012Validator(schema).iter_errors(dict(arguments)):
            if not error.path:
                missing = [name for name in schema.get("required", ()) if name not in arguments]
                return f"{', '.join(missing)}: is missing"
            name = str(error.path[0])
            wanted = accepted(schema["properties"][name])
            return f"{name}: {wanted if wanted.startswith('choose') else f'{wanted}; see the schema of {tool}'}"
        return ""

    def get_input_schema(
        self, tool_name: str, parameters: dict[str, str] | None = None
    ) -> tuple[dict[str, Any], list[list[str | int]]]:
        """Return the schema of a tool's arguments: ranges and choices are those of the options of requests."""
        schema, files = super().get_input_schema(tool_name, parameters)
        for name, found in schema["properties"].items():
            kind = OWN.get(name) or _kind(self._options.get(name, {}))
            if kind:
                kept = {key: found[key] for key in ("description", "default") if key in found}
                schema["properties"][name] = {**kind, **kept}
        return {**schema, "additionalProperties": False}, files

    def postprocess_output_data(self, data: Any, root_url: str) -> list[Any]:
        """Return what a tool has answered as the protocol has it."""
        return [block for answer in data if isinstance(answer, Answer) for block in content(answer)]

    async def _report(self, share: float, text: str) -> None:
        """Tell the client how far its job is, if it has asked for that; some wait longer then."""
        context = self.mcp_server.request_context
        token = None if context.meta is None else context.meta.progressToken
        if token is not None:
            await context.session.send_progress_notification(
                token, share, 1.0, text, related_request_id=str(context.request_id)
            )


def _kind(option: Mapping[str, Any]) -> dict[str, Any]:
    """Return type and range of an option's JSON schema."""
    return {key: value for key, value in option.items() if key not in ("title", "default", "description")}


class Endpoint:
    """The one address: takes messages of the protocol, and answers to nothing else.

    Args:
        server: answers.
        has_users: whether a token is asked for.
    """

    def __init__(self, server: ToolServer, has_users: bool) -> None:
        self._server = server
        self._has_users = has_users

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a message.

        Raises:
            Refusal: another address or method, or no token.
        """
        if scope["path"] not in (PATH, f"{PATH}/"):
            raise Refusal(404, "not_found", f"There is nothing here; the address is {PATH}.")
        if scope["method"] != "POST":  # a GET would hold a stream open on which this server has nothing to say
            raise Refusal(405, "method_not_allowed", f"{PATH} takes POST only.", [(b"allow", b"POST")])
        if self._has_users and "authorization" not in Headers(scope=scope):
            message = "Send a token: Authorization: Bearer TOKEN."
            raise Refusal(401, "unauthorized", message, [(b"www-authenticate", b"Bearer")])
        await self._server.manager.handle_request(scope, receive, send)


def add_mcp(app: FastAPI, engine: Engine, *, has_users: bool) -> ToolServer:
    """Add the MCP server to a server; before the page, which answers for every address.

    Args:
        app: the server, from `create_app`.
        engine: generates.
        has_users: whether people have tokens; each request must then have one, and its jobs are of that user.

    Raises:
        MissingMcpError: it names the extra.
    """
    tools = Tools(engine)
    with gr.Blocks(title="tessera", analytics_enabled=False) as blocks:
        for tool in tools.all():
            gr.api(tool, queue=False)
    server = ToolServer(blocks, tools)
    endpoint = Endpoint(server, has_users)
    app.router.routes += [Route(PATH, endpoint, include_in_schema=False), Mount(PATH, endpoint)]
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with before(app) as state, server.manager.run():
            yield state

    app.router.lifespan_context = lifespan
    return server
