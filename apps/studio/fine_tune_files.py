"""The address at which a run's LoRA can be fetched by whom the run belongs to."""

from __future__ import annotations

import ipaddress
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse

from apps.api.access import Viewer
from apps.api.messages import error_body
from apps.service.fine_tuning import FineTuning
from apps.service.fine_tuning_process import FineTuningError


def address(run: str) -> str:
    """Return the address of a run's LoRA."""
    return f"/fine-tuning/{run}/lora.safetensors"


def add_files(app: FastAPI, runs: FineTuning, has_users: bool) -> None:
    """Serve the LoRA of a run, the best one if that is known.

    Args:
        app: of the server, whose guard has found out who asks.
        runs: its fine-tuning runs.
        has_users: whether people sign in; where nobody is asked who this is, files go to this machine only.
    """

    @app.get(address("{name}"), include_in_schema=False)
    def adapters(name: str, user: Viewer, request: Request) -> FileResponse:
        try:
            found = runs.folder(name, None if user.may("admin") else user.name).loras()
        except FineTuningError:
            found = {}
        file = next(iter(found.values()), None)
        if file is None or not (has_users or is_local(request)):
            raise HTTPException(404, error_body("not_found", "There is no such file."))
        return FileResponse(
            file,
            media_type="application/octet-stream",
            filename=f"{name}.safetensors",
            headers={"Cache-Control": "no-cache"},
        )


def is_local(request: Any) -> bool:
    """Whether a request, of Gradio or Starlette, comes from the machine of the server."""
    client = getattr(request, "client", None)
    if client is None:
        return False
    try:
        return ipaddress.ip_address(client.host).is_loopback
    except ValueError:
        return False
