"""The routes of the gallery: images searched, marked, put on boards, deleted with undo, packed.

Everybody meets the own images only, administrators all of them; favourites and boards are each user's own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi import Path as PathPart
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apps.api.access import Creator, ServerEngine, Viewer
from apps.api.messages import error_body
from apps.api.schema import files, takes
from apps.service.archive import MAX_ARCHIVED
from apps.service.engine import Engine
from apps.service.gallery import Gallery, GoneError
from apps.service.gallery_store import MAX_BOARD_NAME, MAX_NUMBER, Item, NoBoardError, Person, Wanted
from apps.service.request_error import RequestError
from apps.service.sheet import read_sheet
from apps.service.thumbnails import ThumbnailError
from apps.service.uploads import UploadError
from apps.service.validation import explain_fields

router = APIRouter()
"""Served under `/v1`, and to the page under an address of its own."""
MOST_IDS = 10_000
"""Images that one request changes."""
MOST_ROWS = 200
"""Images that one answer describes."""
CACHED = {"Cache-Control": "private, max-age=31536000, immutable"}
"""A number is given once, and its image never changes."""
MEDIA_TYPES = {".png": "image/png", ".webp": "image/webp"}
Number = Annotated[int, PathPart(ge=1, le=MAX_NUMBER)]
BoardNumber = Annotated[int, PathPart(ge=1, le=MAX_NUMBER)]
IdNumber = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Ids = Annotated[list[IdNumber], Field(max_length=MOST_IDS)]
_Model = TypeVar("_Model", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImagesRequest(_Body):
    """Images by their numbers.

    Attributes:
        ids: numbers; those that aren't there, or are others', are left out.
    """

    ids: Ids


class FavouriteRequest(ImagesRequest):
    """Images to mark as favourites, or no longer.

    Attributes:
        favourite: whether they are.
    """

    favourite: bool = True


class RestoreRequest(_Body):
    """What was deleted together.

    Attributes:
        batch: name from the answer to the deletion.
    """

    batch: str = Field(pattern=r"^[0-9a-f]{16}$")


class BoardRequest(_Body):
    """A board.

    Attributes:
        name: printable, each one once.
    """

    name: str = Field(min_length=1, max_length=MAX_BOARD_NAME)


def _gallery(engine: ServerEngine) -> Gallery:
    """Return the gallery of the server.

    Raises:
        HTTPException: 404, it keeps no images.
    """
    try:
        return engine.gallery
    except ValueError as error:
        raise HTTPException(404, error_body("no_gallery", "This server keeps no images.")) from error


def _who(user: Viewer) -> Person:
    return Person(user.name, sees_all=user.may("admin"))


def _changer(user: Creator) -> Person:
    return Person(user.name, sees_all=user.may("admin"))


Images = Annotated[Gallery, Depends(_gallery)]
Looking = Annotated[Person, Depends(_who)]
Changing = Annotated[Person, Depends(_changer)]


def _wanted(
    q: Annotated[str, Query(max_length=500, description="Words that the prompt contains.")] = "",
    model: Annotated[str | None, Query(max_length=200)] = None,
    since: Annotated[float | None, Query(ge=0, le=1e11, description="Seconds since 1970, inclusive.")] = None,
    until: Annotated[float | None, Query(ge=0, le=1e11, description="Seconds since 1970, exclusive.")] = None,
    kind: Literal["image", "clip", "sheet"] | None = None,
    favourites: Annotated[bool, Query(description="Only those that who asks has marked.")] = False,
    board: Annotated[int | None, Query(ge=1, le=MAX_NUMBER, description="Number of a board of who asks.")] = None,
) -> Wanted:
    return Wanted(text=q, model=model, since=since, until=until, kind=kind, favourites=favourites, board=board)


Search = Annotated[Wanted, Depends(_wanted)]


def _read_ids(text: str, most: int) -> list[int]:
    """Read numbers with commas between them.

    Raises:
        HTTPException: 422, something else, or too many.
    """
    parts = text.split(",")
    if len(parts) > most or not all(part.isascii() and part.isdecimal() and len(part) < 17 for part in parts):
        message = f"ids are 1 to {most} numbers with commas between them, such as 3,2,1."
        raise HTTPException(422, error_body("bad_request", message, "ids"))
    return [int(part) for part in parts]


async def _read(request: Request, kind: type[_Model]) -> _Model:
    """Read a body.

    Raises:
        HTTPException: 422.
    """
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise HTTPException(422, error_body("bad_request", explain_fields(error, kind))) from error


def _refused(error: RequestError) -> HTTPException:
    status = 409 if error.key == "board.taken" else 410 if error.key == "archive.none" else 422
    return HTTPException(status, error_body(error.key.replace(".", "_"), str(error)))


def _no_board() -> HTTPException:
    return HTTPException(404, error_body("not_found", "You have no such board."))


def _gone() -> HTTPException:
    return HTTPException(410, error_body("gone", "The image's file has been removed."))


def _one(gallery: Gallery, who: Person, number: int) -> Item:
    """Return an image that a user may see; another's looks as if it weren't there.

    Raises:
        HTTPException: 404.
    """
    found = gallery.items(who, [number])
    if not found:
        raise HTTPException(404, error_body("not_found", "There is no such image."))
    return found[0]


def _row(item: Item, request: Request) -> dict[str, Any]:
    """Describe an image in a list; addresses begin as that of the request does."""
    values = asdict(item)
    here = f"{request.url.path.partition('/images')[0]}/images/{item.number}"
    kept = ("kind", "name", "model", "seed", "width", "height", "frames", "fps", "favourite")
    return {
        "id": item.number,
        **{name: values[name] for name in kept},
        "prompt": item.text,
        "created": round(item.created, 3),
        "thumbnail": f"{here}/thumbnail",
        "url": f"{here}/file",
        "clip": f"{here}/clip" if item.kind == "clip" else None,
        "source": None if item.source is None else f"{here}/source",
    }


def _details(engine: Engine, gallery: Gallery, item: Item) -> dict[str, Any]:
    """Return all that is on record of an image."""
    if item.kind == "sheet":
        try:
            grid = read_sheet(gallery.file(item))
        except (GoneError, RequestError):
            grid = None
        axes = [] if grid is None else [f"{axis.name}: {', '.join(axis.values)}" for axis in grid.axes if axis.name]
        asked = {} if grid is None else grid.request.model_dump(mode="json")
        return {"settings": asked | {"axes": axes}, "seconds": None, "report": "", "notes": []}
    found = next((one for one in engine.pictures(item.job) if one.place == item.place), None)
    if found is None:
        return {"settings": {}, "seconds": None, "report": "", "notes": []}
    return {
        "settings": json.loads(found.settings),
        "seconds": round(found.seconds, 3),
        "report": found.report,
        "notes": json.loads(found.notes),
    }


# ---------------------------------------------------------------------------- looking


@router.get("/images")
def images(
    gallery: Images,
    who: Looking,
    wanted: Search,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 50,
    before: Annotated[int | None, Query(ge=1, le=MAX_NUMBER, description="Number: only lower ones.")] = None,
    ids: Annotated[str | None, Query(max_length=MOST_ROWS * 17, description="Only these, in this order.")] = None,
) -> dict[str, Any]:
    """List images, the newest first; `next` is `before` of the next page."""
    if ids is not None:
        rows = [_row(item, request) for item in gallery.items(who, _read_ids(ids, MOST_ROWS))]
        return {"images": rows, "count": len(rows), "next": None}
    try:
        found, count = gallery.page(who, wanted, limit, before), gallery.count(who, wanted)
    except NoBoardError:
        raise _no_board() from None
    following = found[-1].number if len(found) == limit else None
    return {"images": [_row(item, request) for item in found], "count": count, "next": following}


@router.get("/images/index")
def index(gallery: Images, who: Looking, wanted: Search) -> dict[str, Any]:
    """List the numbers of all images that are wanted, the newest first."""
    try:
        found = gallery.numbers(who, wanted)
    except NoBoardError:
        raise _no_board() from None
    return {"ids": found, "count": len(found)}


@router.get("/images/facets")
def facets(gallery: Images, who: Looking, user: Viewer) -> dict[str, Any]:
    """Say what can be searched for, and whether who asks may change anything."""
    return {
        "models": gallery.models(who),
        "boards": [{"id": one.number, "name": one.name, "count": one.count} for one in gallery.boards(who)],
        "deleted": len(gallery.deleted(Person(who.name))),
        "may_change": user.may("generate"),
        "most_archived": MAX_ARCHIVED,
    }


@router.get("/images/archive", response_class=StreamingResponse, responses=files("application/zip"))
def archive(
    gallery: Images, who: Looking, ids: Annotated[str, Query(max_length=MAX_ARCHIVED * 17)]
) -> StreamingResponse:
    """Pack images and clips into a ZIP file."""
    items = gallery.items(who, _read_ids(ids, MAX_ARCHIVED))
    try:
        parts = gallery.archive(items)
    except RequestError as error:
        raise _refused(error) from error
    headers = {"Content-Disposition": 'attachment; filename="tessera-images.zip"', "Cache-Control": "no-store"}
    return StreamingResponse(parts, media_type="application/zip", headers=headers)


@router.get("/images/{number:int}")
def image(number: Number, gallery: Images, who: Looking, engine: ServerEngine, request: Request) -> dict[str, Any]:
    """Describe an image with all its settings."""
    item = _one(gallery, who, number)
    return _row(item, request) | _details(engine, gallery, item) | {"boards": gallery.boards_of(who, number)}


pictures = files("image/png", "image/webp")


@router.get("/images/{number:int}/file", response_class=FileResponse, responses=pictures)
def file(number: Number, gallery: Images, who: Looking) -> FileResponse:
    """Send the file of an image."""
    try:
        path = gallery.file(_one(gallery, who, number))
    except GoneError:
        raise _gone() from None
    return FileResponse(path, media_type=MEDIA_TYPES.get(path.suffix), headers=CACHED)


@router.get("/images/{number:int}/thumbnail", response_class=FileResponse, responses=files("image/webp"))
def thumbnail(number: Number, gallery: Images, who: Looking) -> FileResponse:
    """Send the small version of an image; of a clip its first frame."""
    try:
        path = gallery.thumbnail(_one(gallery, who, number))
    except (GoneError, ThumbnailError):
        raise _gone() from None
    return FileResponse(path, media_type="image/webp", headers=CACHED)


@router.get("/images/{number:int}/clip", response_class=FileResponse, responses=files("video/mp4"))
def clip(number: Number, gallery: Images, who: Looking) -> FileResponse:
    """Send a clip."""
    path = gallery.clip(_one(gallery, who, number))
    if path is None:
        raise HTTPException(404, error_body("not_found", "There is no clip of this image."))
    return FileResponse(path, media_type="video/mp4", headers=CACHED)


@router.get("/images/{number:int}/source", response_class=Response, responses=files("image/png"))
def source(number: Number, gallery: Images, who: Looking, engine: ServerEngine) -> Response:
    """Send the image that an image was started from, while it is kept."""
    item = _one(gallery, who, number)
    try:
        with engine.uploads.decoding:
            found = None if item.source is None else engine.uploads.get(item.source)
    except UploadError:
        found = None
    if found is None:
        raise HTTPException(404, error_body("not_found", "What this image was started from is not kept."))
    buffer = io.BytesIO()
    found.save(buffer, "PNG", compress_level=1)
    return Response(buffer.getvalue(), media_type="image/png", headers=CACHED)


# --------------------------------------------------------------------------- changing


def _removed(gallery: Gallery, who: Person, numbers: Sequence[int]) -> dict[str, Any]:
    gone = gallery.remove(who, numbers)
    return {"batch": gone.batch, "ids": list(gone.numbers)}


@router.post("/images/delete", openapi_extra=takes(ImagesRequest))
async def delete(gallery: Images, who: Changing, request: Request) -> dict[str, Any]:
    """Delete images; `batch` of the answer restores them. Sheets go with the cells of their grids."""
    wanted = await _read(request, ImagesRequest)
    return await run_in_threadpool(_removed, gallery, who, wanted.ids)


@router.delete("/images/{number:int}")
def delete_one(number: Number, gallery: Images, who: Changing) -> dict[str, Any]:
    """Delete an image."""
    _one(gallery, who, number)
    return _removed(gallery, who, [number])


@router.post("/images/restore", openapi_extra=takes(RestoreRequest))
async def restore(gallery: Images, who: Changing, request: Request) -> dict[str, Any]:
    """Bring back what was deleted together."""
    wanted = await _read(request, RestoreRequest)
    found = await run_in_threadpool(gallery.restore, who, wanted.batch)
    if not found:
        raise HTTPException(404, error_body("not_found", "Nothing that was deleted so is kept any more."))
    return {"ids": list(found)}


@router.delete("/trash")
def empty_trash(gallery: Images, who: Changing) -> dict[str, Any]:
    """Remove what was deleted for good."""
    return {"count": gallery.empty_trash(who)}


@router.post("/images/favourite", openapi_extra=takes(FavouriteRequest))
async def favourite(gallery: Images, who: Changing, request: Request) -> dict[str, Any]:
    """Mark images as favourites, or no longer."""
    wanted = await _read(request, FavouriteRequest)
    return {"ids": await run_in_threadpool(gallery.mark, who, wanted.ids, wanted.favourite)}


@router.get("/boards")
def boards(gallery: Images, who: Looking) -> dict[str, Any]:
    """List the boards of who asks."""
    rows = [{"id": one.number, "name": one.name, "count": one.count} for one in gallery.boards(who)]
    return {"boards": rows}


@router.post("/boards", status_code=201, openapi_extra=takes(BoardRequest))
async def add_board(gallery: Images, who: Changing, request: Request) -> dict[str, Any]:
    """Create a board."""
    wanted = await _read(request, BoardRequest)
    try:
        made = await run_in_threadpool(gallery.add_board, who, wanted.name)
    except RequestError as error:
        raise _refused(error) from error
    return {"id": made.number, "name": made.name, "count": 0}


@router.patch("/boards/{board:int}", openapi_extra=takes(BoardRequest))
async def rename_board(board: BoardNumber, gallery: Images, who: Changing, request: Request) -> dict[str, Any]:
    """Give a board another name."""
    wanted = await _read(request, BoardRequest)
    try:
        await run_in_threadpool(gallery.rename_board, who, board, wanted.name)
    except NoBoardError:
        raise _no_board() from None
    except RequestError as error:
        raise _refused(error) from error
    return {"id": board}


@router.delete("/boards/{board:int}")
def remove_board(board: BoardNumber, gallery: Images, who: Changing) -> dict[str, Any]:
    """Remove a board; its images stay."""
    try:
        gallery.remove_board(who, board)
    except NoBoardError:
        raise _no_board() from None
    return {"id": board}


def _changed(gallery: Gallery, who: Person, board: int, numbers: Sequence[int], is_on: bool) -> dict[str, Any]:
    try:
        return {"ids": gallery.put_on_board(who, board, numbers, is_on)}
    except NoBoardError:
        raise _no_board() from None


@router.post("/boards/{board:int}/images", openapi_extra=takes(ImagesRequest))
async def put_on(board: BoardNumber, gallery: Images, who: Changing, request: Request) -> dict[str, Any]:
    """Put images on a board."""
    wanted = await _read(request, ImagesRequest)
    return await run_in_threadpool(_changed, gallery, who, board, wanted.ids, True)


@router.post("/boards/{board:int}/images/remove", openapi_extra=takes(ImagesRequest))
async def take_off(board: BoardNumber, gallery: Images, who: Changing, request: Request) -> dict[str, Any]:
    """Take images off a board."""
    wanted = await _read(request, ImagesRequest)
    return await run_in_threadpool(_changed, gallery, who, board, wanted.ids, False)
