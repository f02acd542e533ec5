"""Tables of the gallery in the database of jobs: what is searched, favourites, boards, what was deleted.

Each image with a file has a row of its own, which a trigger writes in the transaction that records the image. So a
search reads no JSON, and the number of a row, which is given once and never again, orders images stably: pages of a
listing go from number to number, whatever is added or deleted meanwhile.
"""

from __future__ import annotations

import sqlite3

SCHEMA = """
CREATE TABLE IF NOT EXISTS gallery_items(
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, job TEXT NOT NULL,
    place INTEGER NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL, model TEXT NOT NULL, seed INTEGER,
    width INTEGER NOT NULL, height INTEGER NOT NULL, frames INTEGER, fps REAL, source TEXT, created REAL NOT NULL,
    deleted REAL, batch TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS gallery_items_by_owner ON gallery_items(owner, number) WHERE deleted IS NULL;
CREATE INDEX IF NOT EXISTS gallery_items_by_batch ON gallery_items(batch) WHERE deleted IS NOT NULL;
CREATE INDEX IF NOT EXISTS gallery_items_by_job ON gallery_items(job);
CREATE TABLE IF NOT EXISTS sheet_cells(
    sheet INTEGER NOT NULL, job TEXT NOT NULL, PRIMARY KEY(job, sheet)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS favourites(
    owner TEXT NOT NULL, item INTEGER NOT NULL, PRIMARY KEY(owner, item)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS boards(
    number INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL,
    UNIQUE(owner, name));
CREATE TABLE IF NOT EXISTS board_items(
    board INTEGER NOT NULL, item INTEGER NOT NULL, PRIMARY KEY(board, item)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS board_items_by_item ON board_items(item);
"""
_COLUMNS = "name, owner, job, place, kind, text, model, seed, width, height, frames, fps, source, created"
_ROW = """
    SELECT {row}.name, jobs.owner, {row}.job, {row}.place,
        CASE WHEN json_extract({row}.settings, '$.frames') IS NULL THEN 'image' ELSE 'clip' END,
        coalesce(nullif(json_extract({row}.settings, '$.prompt'), ''), json_extract({row}.settings, '$.label'), ''),
        coalesce(json_extract({row}.settings, '$.model'), ''), json_extract({row}.settings, '$.seed'),
        coalesce(json_extract({row}.settings, '$.width'), 0)
            * coalesce(json_extract({row}.settings, '$.upscale'), 1),
        coalesce(json_extract({row}.settings, '$.height'), 0)
            * coalesce(json_extract({row}.settings, '$.upscale'), 1),
        json_extract({row}.settings, '$.frames'), json_extract({row}.settings, '$.fps'),
        json_extract({row}.settings, '$.image'), {created}
    FROM {source} WHERE {row}.name != '' AND json_valid({row}.settings)
        AND NOT EXISTS (SELECT 1 FROM gallery_items WHERE gallery_items.name = {row}.name)
"""
"""Not by a conflict clause: that of the statement which fires a trigger goes before those of the trigger."""
_NOW = "(julianday('now') - 2440587.5) * 86400.0"
_ADDED = _ROW.format(row="NEW", source="jobs", created=_NOW) + " AND jobs.id = NEW.job"
_TRIGGER = (
    "CREATE TRIGGER IF NOT EXISTS gallery_added AFTER INSERT ON pictures "
    f"BEGIN INSERT INTO gallery_items({_COLUMNS}) {_ADDED}; END"
)
_OLDER = (
    _ROW.format(
        row="pictures",
        source="pictures JOIN jobs ON jobs.id = pictures.job",
        created="coalesce(jobs.ended, jobs.created)",
    )
    + " ORDER BY jobs.number, pictures.place"
)
TEXTS = """
CREATE VIRTUAL TABLE IF NOT EXISTS gallery_texts USING fts5(text, tokenize = 'trigram');
CREATE TRIGGER IF NOT EXISTS gallery_text_added AFTER INSERT ON gallery_items
    BEGIN INSERT INTO gallery_texts(rowid, text) VALUES (NEW.number, NEW.text); END;
CREATE TRIGGER IF NOT EXISTS gallery_text_gone AFTER DELETE ON gallery_items
    BEGIN DELETE FROM gallery_texts WHERE rowid = OLD.number; END;
INSERT INTO gallery_texts(rowid, text)
    SELECT number, text FROM gallery_items WHERE number NOT IN (SELECT rowid FROM gallery_texts);
"""
NO_TEXTS = "DROP TRIGGER IF EXISTS gallery_text_added; DROP TRIGGER IF EXISTS gallery_text_gone;"


def prepare(db: sqlite3.Connection) -> None:
    """Create the tables that are missing, and the rows of images that an older version recorded.

    Args:
        db: the database of jobs, whose own tables exist.

    Raises:
        sqlite3.Error: it can't be written.
    """
    db.executescript(SCHEMA)
    db.execute(_TRIGGER)
    db.execute(f"INSERT INTO gallery_items({_COLUMNS}) {_OLDER}")
    add_text_index(db)


def add_text_index(db: sqlite3.Connection) -> None:
    """Create the index of texts where this SQLite has one of parts of words: FTS5 with its trigram tokenizer."""
    try:
        db.executescript(TEXTS)
    except sqlite3.OperationalError as error:
        if not any(sign in str(error) for sign in ("no such module", "no such tokenizer", "error in tokenizer")):
            raise
        db.executescript(NO_TEXTS)  # of a database that another SQLite has written


def has_text_index(db: sqlite3.Connection) -> bool:
    """Whether texts are searched with an index, see `add_text_index`."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND name = 'gallery_text_added'"
    return db.execute(query).fetchone() is not None
