"""Who asks, what they may, and what every route needs: the engine, a job in its line, how a model is described."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request

from apps.api.messages import error_body
from apps.api.tokens import Role, User
from apps.service.compute_profiles import UnavailableError
from apps.service.engine import Engine
from apps.service.failures import UnknownModelError
from apps.service.job_store import QueueFullError
from apps.service.lora import LoraError
from apps.service.quantized import stored_quantization
from apps.service.quotas import QuotaError
from apps.service.request_error import RequestError
from apps.service.requests import AnyRequest
from apps.service.uploads import UploadError
from apps.service.upscaling import UnknownUpscalerError


def _user(request: Request) -> User:
    """Return who asks; the guard has asked for the token."""
    return request.state.user


def require(role: Role) -> Any:
    """Return a dependency that lets in only users with a role."""

    def check(user: Annotated[User, Depends(_user)]) -> User:
        if not user.may(role):
            raise HTTPException(403, error_body("forbidden", f"This needs the role {role!r}; yours is {user.role!r}."))
        return user

    return Depends(check)


Viewer = Annotated[User, require("view")]
Creator = Annotated[User, require("generate")]
Admin = Annotated[User, require("admin")]


def _engine(request: Request) -> Engine:
    return request.app.state.engine


ServerEngine = Annotated[Engine, Depends(_engine)]


def enqueue(engine: Engine, wanted: AnyRequest, user: User) -> str:
    """Submit a request for a user.

    Raises:
        HTTPException: 404, 422 or 429.
    """
    try:
        return engine.submit(wanted, user.name)
    except UnknownModelError as error:
        raise HTTPException(404, error_body("unknown_model", str(error))) from error
    except LoraError as error:
        raise HTTPException(404, error_body("unknown_lora", str(error))) from error
    except UnknownUpscalerError as error:
        raise HTTPException(404, error_body("unknown_upscaler", str(error), "upscaler")) from error
    except UploadError as error:
        raise HTTPException(422, error_body("unknown_picture", str(error))) from error
    except UnavailableError as error:
        raise HTTPException(422, error_body("unavailable", str(error))) from error
    except RequestError as error:  # a preset, a wildcard or a prompt that can't be had
        raise HTTPException(422, error_body("bad_request", str(error))) from error
    except QuotaError as error:
        wait = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        raise HTTPException(429, error_body("quota", str(error)), wait) from error
    except QueueFullError as error:
        raise HTTPException(429, error_body("queue_full", str(error)), {"Retry-After": "5"}) from error


def model_row(engine: Engine, key: str) -> dict[str, Any]:
    """Describe a model; of one that isn't loaded only the name, and what its folder tells, is known."""
    row: dict[str, Any] = {"id": key, "object": "model", "created": 0, "owned_by": "local"}
    row["tasks"] = list(engine.abilities(key).tasks)
    stored = stored_quantization(engine.source(key))
    if stored is not None:
        row["quantization"] = {"bits": stored.bits, "recipe": stored.recipe, "bytes": stored.nbytes}
    future = engine.model(key) if key == engine.models[0] else engine.loaded(key)
    if future is None or not future.done() or future.exception() is not None:
        return row
    model = future.result()
    size = {"width": model.width, "height": model.side, "multiple": model.multiple}
    return row | {"schedulers": list(model.schedulers), **size, "steps": model.steps}
