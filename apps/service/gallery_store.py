"""Questions to the gallery's tables and changes of them; each knows who asks, and nobody meets images of others."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from apps.service.gallery_schema import has_text_index
from apps.service.job_store import JobStore
from apps.service.request_error import RequestError

Kind = Literal["image", "clip", "sheet"]
MAX_IDS = 200_000
"""Numbers of images that one listing gives."""
MAX_BOARDS = 200
"""Of one user."""
MAX_BOARD_NAME = 80
"""Characters."""
TRIGRAM = 3
"""Characters that the index of texts finds at least."""
MAX_NUMBER = 2**53 - 1
"""Numbers that JavaScript keeps as they are."""
COLUMNS = (
    "item.number, item.name, item.owner, item.job, item.place, item.kind, item.text, item.model, item.seed, "
    "item.width, item.height, item.frames, item.fps, item.source, item.created, "
    "EXISTS (SELECT 1 FROM favourites WHERE favourites.item = item.number AND favourites.owner = ?)"
)


class NoBoardError(KeyError):
    """The user has no such board."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks.

    Attributes:
        name: of the user, whose favourites and boards these are.
        sees_all: whether images of all users may be seen and deleted, as administrators may.
    """

    name: str
    sees_all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which images are looked for; what is left as it is leaves none out.

    Attributes:
        text: words, each of which the prompt contains somewhere; upper and lower case are the same.
        model: name of the model.
        since: seconds since 1970, inclusive.
        until: seconds since 1970, exclusive.
        kind: `image`, `clip` or `sheet`.
        favourites: only those that the user has marked.
        board: only those on this board of the user.
    """

    text: str = ""
    model: str | None = None
    since: float | None = None
    until: float | None = None
    kind: Kind | None = None
    favourites: bool = False
    board: int | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """An image, a clip or the sheet of a grid in the gallery.

    Attributes:
        number: given once.
        name: of its file in the output folder.
        owner: who asked for it.
        job: that it is of; empty for a sheet.
        place: which image of its job.
        kind: `image`, `clip` or `sheet`.
        text: prompt, or number or name of the class.
        model: its name.
        seed: None for a sheet.
        width: pixels.
        height: pixels.
        frames: of a clip.
        fps: frames a second of a clip.
        source: hash of the image that it started from.
        created: seconds since 1970.
        favourite: whether who asks has marked it.
    """

    number: int
    name: str
    owner: str
    job: str
    place: int
    kind: Kind
    text: str
    model: str
    seed: int | None
    width: int
    height: int
    frames: int | None
    fps: float | None
    source: str | None
    created: float
    favourite: bool


@dataclass(frozen=True, slots=True)
class Board:
    """A named collection of images.

    Attributes:
        number: given once.
        name: as its owner calls it.
        count: images on it.
    """

    number: int
    name: str
    count: int


class GalleryStore:
    """The gallery's tables.

    Args:
        jobs: the store of jobs, whose database they are in.
    """

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        with jobs.using() as db:
            self._is_indexed = has_text_index(db)

    # ------------------------------------------------------------------ looking

    def numbers(self, who: Person, wanted: Wanted) -> list[int]:
        """Return the numbers of all images that are wanted, the newest first, at most `MAX_IDS`."""
        where, values = self._where(who, wanted)
        query = f"SELECT item.number FROM gallery_items AS item {where} ORDER BY item.number DESC LIMIT {MAX_IDS}"
        with self._jobs.using() as db:
            return [number for (number,) in db.execute(query, values)]

    def page(self, who: Person, wanted: Wanted, limit: int, before: int | None = None) -> list[Item]:
        """Return images that are wanted, the newest first.

        Args:
            who: asks.
            wanted: what for.
            limit: how many at most.
            before: only those with lower numbers; the number of the last image of the page before.
        """
        where, values = self._where(who, wanted)
        if before is not None:
            where, values = f"{where} AND item.number < ?", [*values, before]
        query = f"SELECT {COLUMNS} FROM gallery_items AS item {where} ORDER BY item.number DESC LIMIT ?"
        with self._jobs.using() as db:
            return [_item(row) for row in db.execute(query, (who.name, *values, limit))]

    def count(self, who: Person, wanted: Wanted) -> int:
        """Return how many images are wanted."""
        where, values = self._where(who, wanted)
        with self._jobs.using() as db:
            return db.execute(f"SELECT count(*) FROM gallery_items AS item {where}", values).fetchone()[0]

    def items(self, who: Person, numbers: Sequence[int]) -> list[Item]:
        """Return images by their numbers, in this order; those that aren't there, or are not to be seen, are left out.

        Args:
            who: asks.
            numbers: of images.
        """
        where, values = self._where(who, Wanted())
        query = f"SELECT {COLUMNS} FROM gallery_items AS item {where} AND item.number = ?"
        with self._jobs.using() as db:
            rows = [db.execute(query, (who.name, *values, number)).fetchone() for number in dict.fromkeys(numbers)]
        return [_item(row) for row in rows if row is not None]

    def models(self, who: Person) -> list[str]:
        """Return the models whose images there are, by name."""
        where, values = self._where(who, Wanted())
        with self._jobs.using() as db:
            rows = db.execute(f"SELECT DISTINCT item.model FROM gallery_items AS item {where} ORDER BY 1", values)
            return [name for (name,) in rows if name]

    def _where(self, who: Person, wanted: Wanted) -> tuple[str, list[object]]:
        """Return the condition on images that are wanted, and its values.

        Raises:
            NoBoardError: the board isn't the user's.
        """
        conditions: list[tuple[str, list[object]]] = [("item.deleted IS NULL", [])]
        if not who.sees_all:
            conditions.append(("item.owner = ?", [who.name]))
        conditions += [self._contains(word) for word in wanted.text.split()]
        for column, value in (
            ("model =", wanted.model),
            ("created >=", wanted.since),
            ("created <", wanted.until),
            ("kind =", wanted.kind),
        ):
            if value is not None:
                conditions.append((f"item.{column} ?", [value]))
        if wanted.favourites:
            conditions.append(("item.number IN (SELECT item FROM favourites WHERE owner = ?)", [who.name]))
        if wanted.board is not None:
            self._check_board(who, wanted.board)
            conditions.append(("item.number IN (SELECT item FROM board_items WHERE board = ?)", [wanted.board]))
        joined = " AND ".join(text for text, _ in conditions)
        return f"WHERE {joined}", [value for _, values in conditions for value in values]

    def _contains(self, word: str) -> tuple[str, list[object]]:
        """Return the condition that a text contains a word; what means something to SQLite means itself here."""
        if "\0" in word:  # to SQLite a pattern ends there
            return "0", []
        if self._is_indexed and len(word) >= TRIGRAM:
            quoted = '"' + word.replace('"', '""') + '"'
            return "item.number IN (SELECT rowid FROM gallery_texts WHERE gallery_texts MATCH ?)", [quoted]
        escaped = word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        return "item.text LIKE ? ESCAPE '\\'", [f"%{escaped}%"]

    # ------------------------------------------------------------------ favourites and boards

    def mark(self, who: Person, numbers: Sequence[int], is_favourite: bool) -> list[int]:
        """Mark images as favourites of a user, or no longer.

        Returns:
            The numbers of those that there are.
        """
        found = [item.number for item in self.items(who, numbers)]
        query = "INSERT OR IGNORE INTO favourites VALUES (?, ?)"
        if not is_favourite:
            query = "DELETE FROM favourites WHERE owner = ? AND item = ?"
        self._change_many(query, [(who.name, number) for number in found])
        return found

    def boards(self, who: Person) -> list[Board]:
        """Return a user's boards by name."""
        shown = "JOIN gallery_items AS item ON item.number = board_items.item AND item.deleted IS NULL"
        count = f"(SELECT count(*) FROM board_items {shown} WHERE board = boards.number)"
        query = f"SELECT number, name, {count} FROM boards WHERE owner = ? ORDER BY name COLLATE NOCASE, number"
        with self._jobs.using() as db:
            return [Board(*row) for row in db.execute(query, (who.name,))]

    def boards_of(self, who: Person, number: int) -> list[int]:
        """Return the numbers of a user's boards that an image is on."""
        query = "SELECT board FROM board_items JOIN boards ON boards.number = board WHERE item = ? AND owner = ?"
        with self._jobs.using() as db:
            return [board for (board,) in db.execute(query, (number, who.name))]

    def add_board(self, who: Person, name: str) -> Board:
        """Create an empty board.

        Raises:
            RequestError: the name is empty, too long or taken, or there are too many boards.
        """
        name = self._board_name(who, name)
        if len(self.boards(who)) >= MAX_BOARDS:
            message = f"There are {MAX_BOARDS} boards, and no more are kept; delete one first."
            raise RequestError("board.most", message, most=MAX_BOARDS)
        with self._jobs.using() as db:
            row = db.execute(
                "INSERT INTO boards(owner, name, created) VALUES (?, ?, ?) RETURNING number",
                (who.name, name, time.time()),
            ).fetchone()
        return Board(row[0], name, 0)

    def rename_board(self, who: Person, board: int, name: str) -> None:
        """Give a board another name.

        Raises:
            NoBoardError: the user has no such board.
            RequestError: the name is empty, too long or taken.
        """
        self._check_board(who, board)
        name = self._board_name(who, name, besides=board)
        with self._jobs.using() as db:
            db.execute("UPDATE boards SET name = ? WHERE number = ?", (name, board))

    def remove_board(self, who: Person, board: int) -> None:
        """Remove a board; its images stay.

        Raises:
            NoBoardError: the user has no such board.
        """
        self._check_board(who, board)
        with self._jobs.using() as db:
            db.execute("DELETE FROM boards WHERE number = ?", (board,))
            db.execute("DELETE FROM board_items WHERE board = ?", (board,))

    def put_on_board(self, who: Person, board: int, numbers: Sequence[int], is_on: bool = True) -> list[int]:
        """Put images on a board, or take them off it.

        Returns:
            The numbers of those that there are.

        Raises:
            NoBoardError: the user has no such board.
        """
        self._check_board(who, board)
        found = [item.number for item in self.items(who, numbers)]
        query = "INSERT OR IGNORE INTO board_items VALUES (?, ?)"
        if not is_on:
            query = "DELETE FROM board_items WHERE board = ? AND item = ?"
        self._change_many(query, [(board, number) for number in found])
        return found

    def _board_name(self, who: Person, name: str, besides: int | None = None) -> str:
        """Return a name without spaces around it, if a board may have it.

        Raises:
            RequestError: it may not.
        """
        name = " ".join(name.split())
        if not 1 <= len(name) <= MAX_BOARD_NAME or not name.isprintable():
            message = f"The name of a board has 1 to {MAX_BOARD_NAME} printable characters; choose such a name."
            raise RequestError("board.name", message, most=MAX_BOARD_NAME)
        if any(one.name == name and one.number != besides for one in self.boards(who)):
            raise RequestError("board.taken", f"There is a board {name!r} already; choose another name.", value=name)
        return name

    def _check_board(self, who: Person, board: int) -> None:
        query = "SELECT 1 FROM boards WHERE number = ? AND owner = ?"
        with self._jobs.using() as db:
            if db.execute(query, (board, who.name)).fetchone() is None:
                raise NoBoardError(board)

    # ------------------------------------------------------------------ deleting

    def delete(self, who: Person, numbers: Sequence[int]) -> tuple[str, list[Item]]:
        """Mark images as deleted, and the sheets of grids that they are cells of.

        Returns:
            A name for what was deleted together, 16 hex digits, and all of it.
        """
        found = self.items(who, numbers)
        jobs = [item.job for item in found if item.job]
        query = "SELECT sheet FROM sheet_cells WHERE job = ?"
        with self._jobs.using() as db:
            sheets = [sheet for job in jobs for (sheet,) in db.execute(query, (job,))]
        gone = self.items(who, [*(item.number for item in found), *sheets])
        batch, now = secrets.token_hex(8), time.time()
        query = "UPDATE gallery_items SET deleted = ?, batch = ? WHERE number = ?"
        self._change_many(query, [(now, batch, item.number) for item in gone])
        return batch, gone

    def deleted(
        self, who: Person | None = None, *, batch: str | None = None, before: float | None = None
    ) -> list[Item]:
        """Return images that are marked as deleted.

        Args:
            who: only those that this user may see; None for all.
            batch: only those that were deleted together.
            before: only those deleted before this time, seconds since 1970.
        """
        where, values = "WHERE item.deleted IS NOT NULL", []
        if who is not None and not who.sees_all:
            where, values = f"{where} AND item.owner = ?", [who.name]
        if batch is not None:
            where, values = f"{where} AND item.batch = ?", [*values, batch]
        if before is not None:
            where, values = f"{where} AND item.deleted < ?", [*values, before]
        query = f"SELECT {COLUMNS} FROM gallery_items AS item {where} ORDER BY item.number DESC"
        with self._jobs.using() as db:
            return [_item(row) for row in db.execute(query, ("" if who is None else who.name, *values))]

    def is_known(self, number: int) -> bool:
        """Whether an image is on record, deleted or not."""
        with self._jobs.using() as db:
            return db.execute("SELECT 1 FROM gallery_items WHERE number = ?", (number,)).fetchone() is not None

    def undelete(self, numbers: Iterable[int]) -> None:
        """Take the mark off images that are marked as deleted."""
        query = "UPDATE gallery_items SET deleted = NULL, batch = '' WHERE number = ?"
        self._change_many(query, [(number,) for number in numbers])

    def purge(self, items: Iterable[Item]) -> None:
        """Forget deleted images; their jobs count them as done, without files."""
        items = list(items)
        self._change_many("UPDATE pictures SET name = '' WHERE name = ?", [(item.name,) for item in items])
        for query in (
            "DELETE FROM favourites WHERE item = ?",
            "DELETE FROM board_items WHERE item = ?",
            "DELETE FROM sheet_cells WHERE sheet = ?",
            "DELETE FROM gallery_items WHERE number = ?",
        ):
            self._change_many(query, [(item.number,) for item in items])

    # ------------------------------------------------------------------ sheets

    def add_sheet(
        self, owner: str, name: str, text: str, model: str, size: tuple[int, int], jobs: Sequence[str]
    ) -> None:
        """Record the sheet of a grid, unless it is on record.

        Args:
            owner: of the grid.
            name: of the sheet's file.
            text: prompt.
            model: its name.
            size: width and height of the sheet, pixels.
            jobs: of the grid's cells.
        """
        with self._jobs.using() as db:
            if db.execute("SELECT 1 FROM gallery_items WHERE name = ?", (name,)).fetchone() is not None:
                return
            columns = "name, owner, job, place, kind, text, model, width, height, created"
            query = f"INSERT INTO gallery_items({columns}) VALUES (?, ?, '', 0, 'sheet', ?, ?, ?, ?, ?)"
            (number,) = db.execute(
                f"{query} RETURNING number", (name, owner, text, model, *size, time.time())
            ).fetchone()
        self._change_many("INSERT OR IGNORE INTO sheet_cells VALUES (?, ?)", [(number, job) for job in jobs])

    def _change_many(self, query: str, values: Sequence[tuple[object, ...]]) -> None:
        """Change rows in one transaction."""
        with self._jobs.using() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                db.executemany(query, values)
                db.execute("COMMIT")
            except sqlite3.Error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def _item(row: Sequence[object]) -> Item:
    *values, favourite = row
    return Item(*values, bool(favourite))  # pyright: ignore[reportArgumentType,reportCallIssue]
