"""What the gallery's script asks of the server: which images there are, their files, and changes of them.

Each route is for who asks: the guard of the server has found out who that is, and the store shows nobody's images but
their own, administrators excepted. Changes are refused to pages of other sites by the guard, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Form, HTTPException, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from apps.api.access import Creator, Viewer
from apps.api.messages import error_body
from apps.api.tokens import User
from apps.service.archive import MAX_ARCHIVED
from apps.service.gallery import Gallery, GoneError
from apps.service.gallery_store import MAX_NUMBER, Item, Kind, NoBoardError, Person, Wanted
from apps.service.metadata import MetadataError, read_picture
from apps.service.request_error import RequestError
from apps.service.thumbnails import ThumbnailError
from apps.studio.fine_tune_files import is_local

PREFIX = "/gallery"
MOST_ROWS = 200
"""Rows of one answer."""
MOST_CHANGED = 5_000
"""Images of one change."""
KEPT = {"Cache-Control": "private, max-age=31536000, immutable"}
"""Of files that never change: a number is given once."""
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Numbers = Annotated[list[Number], Field(min_length=1, max_length=MOST_CHANGED)]


class Chosen(BaseModel):
    """Images that something is done with."""

    model_config = ConfigDict(extra="forbid")
    numbers: Numbers


class Mark(Chosen):
    """Images that become favourites, or stop to be some."""

    favourite: bool


class Placed(Chosen):
    """Images that are put on a board, or taken off it; a board without a number is made anew."""

    board: Number | None = None
    name: str = Field(default="", max_length=200)
    is_on: bool = True


class Undo(BaseModel):
    """A deletion that is taken back."""

    model_config = ConfigDict(extra="forbid")
    batch: str = Field(pattern=r"^[0-9a-f]{16}$")


def add_routes(app: FastAPI, gallery: Gallery, has_users: bool) -> None:
    """Serve a gallery to the page.

    Args:
        app: of the server, whose guard has found out who asks.
        gallery: of its engine.
        has_users: whether people sign in; where nobody is asked who this is, it is for this machine only.
    """

    def person(user: User, request: Request) -> Person:
        if not (has_users or is_local(request)):
            raise HTTPException(404, error_body("not_found", "There is no such page."))
        return Person(user.name, user.may("admin"))

    def one(user: User, request: Request, number: int) -> Item:
        found = gallery.items(person(user, request), [number])
        if not found:
            raise HTTPException(404, error_body("not_found", "There is no such image."))
        return found[0]

    @app.get(f"{PREFIX}/items", include_in_schema=False)
    def items(
        user: Viewer,
        request: Request,
        text: Annotated[str, Query(max_length=200)] = "",
        model: Annotated[str | None, Query(max_length=300)] = None,
        since: float | None = None,
        until: float | None = None,
        kind: Kind | None = None,
        favourites: bool = False,
        board: Number | None = None,
    ) -> dict[str, Any]:
        who = person(user, request)
        wanted = Wanted(text=text, model=model or None, since=since, until=until, kind=kind,
                        favourites=favourites, board=board)  # fmt: skip
        with _refusing():
            numbers = gallery.numbers(who, wanted)
        boards = [asdict(board) for board in gallery.boards(who)]
        return {"numbers": numbers, "models": gallery.models(who), "boards": boards}

    @app.get(f"{PREFIX}/rows", include_in_schema=False)
    def rows(user: Viewer, request: Request, numbers: Annotated[str, Query(max_length=4_000)]) -> list[dict[str, Any]]:
        asked = [int(one) for one in numbers.split(",") if one.isdecimal() and len(one) < 17][:MOST_ROWS]
        return [_row(item) for item in gallery.items(person(user, request), asked)]

    @app.get(f"{PREFIX}/thumbnail/{{number}}", include_in_schema=False)
    def thumbnail(user: Viewer, request: Request, number: Number) -> FileResponse:
        item = one(user, request, number)
        with _refusing():
            return FileResponse(gallery.thumbnail(item), media_type="image/webp", headers=KEPT)

    @app.get(f"{PREFIX}/file/{{number}}", include_in_schema=False)
    def file(user: Viewer, request: Request, number: Number, clip: bool = False) -> FileResponse:
        item = one(user, request, number)
        with _refusing():
            found = gallery.clip(item) if clip else gallery.file(item)
        if found is None:
            raise HTTPException(404, error_body("not_found", "There is no clip of this image."))
        return FileResponse(found, media_type=_media_type(found), headers=KEPT)

    @app.get(f"{PREFIX}/settings/{{number}}", include_in_schema=False)
    def settings(user: Viewer, request: Request, number: Number) -> dict[str, Any]:
        item = one(user, request, number)
        with _refusing():
            found = read_picture(gallery.file(item)).model_dump(mode="json", exclude_none=True)
        return {name: value for name, value in found.items() if value not in ("", [], {}, False)}

    @app.post(f"{PREFIX}/mark", include_in_schema=False)
    def mark(user: Creator, request: Request, wanted: Mark) -> dict[str, Any]:
        return {"numbers": gallery.mark(person(user, request), wanted.numbers, wanted.favourite)}

    @app.post(f"{PREFIX}/board", include_in_schema=False)
    def board(user: Creator, request: Request, wanted: Placed) -> dict[str, Any]:
        who = person(user, request)
        with _refusing():
            number = gallery.add_board(who, wanted.name).number if wanted.board is None else wanted.board
            found = gallery.put_on_board(who, number, wanted.numbers, wanted.is_on)
        return {"board": number, "numbers": found}

    @app.post(f"{PREFIX}/delete", include_in_schema=False)
    def delete(user: Creator, request: Request, wanted: Chosen) -> dict[str, Any]:
        return asdict(gallery.remove(person(user, request), wanted.numbers))

    @app.post(f"{PREFIX}/restore", include_in_schema=False)
    def restore(user: Creator, request: Request, wanted: Undo) -> dict[str, Any]:
        return {"numbers": gallery.restore(person(user, request), wanted.batch)}

    @app.post(f"{PREFIX}/zip", include_in_schema=False)
    def archive(user: Viewer, request: Request, numbers: Annotated[str, Form(max_length=20_000)]) -> StreamingResponse:
        asked = [int(one) for one in numbers.split(",") if one.isdecimal() and len(one) < 17][: MAX_ARCHIVED + 1]
        found = gallery.items(person(user, request), asked)
        with _refusing():
            parts: Iterable[bytes] = gallery.archive(found)
        named = {"Content-Disposition": 'attachment; filename="tessera-images.zip"'}
        return StreamingResponse(parts, media_type="application/zip", headers=named)


def _row(item: Item) -> dict[str, Any]:
    """Return what the page is told of an image: no name of a file and of no user."""
    names = (
        "number", "kind", "text", "model", "seed", "width", "height", "frames", "fps", "created", "favourite", "source",
    )  # fmt: skip
    return {name: getattr(item, name) for name in names}


def _media_type(file: Path) -> str:
    return {".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4"}.get(
        file.suffix, "application/octet-stream"
    )


class _refusing:  # noqa: N801  (reads as a word)
    """Turns refusals of the gallery into answers, without paths."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise what the browser is answered."""
        if isinstance(error, NoBoardError):
            raise HTTPException(404, error_body("not_found", "There is no such board.")) from error
        if isinstance(error, RequestError) and not isinstance(error, MetadataError):
            raise HTTPException(422, error_body(error.key, str(error))) from error
        if isinstance(error, GoneError | ThumbnailError | MetadataError):
            raise HTTPException(404, error_body("not_found", "The file has been removed, or can't be read.")) from error
