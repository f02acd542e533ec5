"""What the tab Server shows: tables of users and of the queue, and how full the devices are, as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from apps.service.accounting import Used
from apps.service.device_state import DeviceState
from apps.service.quotas import MB, Quotas
from apps.service.server_state import QueueRow
from apps.studio.strings import Strings

USERS = ("user", "role", "images", "seconds", "unfinished", "storage")
QUEUE = ("user", "model", "state", "since", "work", "stop")
"""Columns of the tables."""
GIB = 2**30


def users(rows: Sequence[tuple[str, str | None, Quotas, Used]], words: Strings) -> str:
    """Draw who uses the server.

    Args:
        rows: name, role (None for who was removed), quotas, and what is used.
        words: of the page.
    """
    return _table("users", USERS, [_user(*row, words) for row in rows], words)


def queue(rows: Sequence[QueueRow], moment: float, words: Strings) -> str:
    """Draw what runs and waits, each with a button that stops it.

    Args:
        rows: in the order of service.
        moment: now, seconds since 1970.
        words: of the page.
    """
    if not rows:
        return f'{_title("queue", words)}<p class="hint">{escape(words("server.empty"))}</p>'
    return _table("queue", QUEUE, [_job(row, moment, words) for row in rows], words)


def devices(states: Sequence[DeviceState], words: Strings) -> str:
    """Draw how full the devices are and which models are on them."""
    return _title("devices", words) + "".join(_device(one, words) for one in states)


def duration(seconds: float, words: Strings) -> str:
    """Say how long something has lasted, to the second below a minute and to the minute above."""
    whole = max(int(seconds), 0)
    if whole < 60:
        return words("server.seconds", seconds=whole)
    hours, minutes = divmod(whole // 60, 60)
    return words("server.hours", hours=hours, minutes=minutes) if hours else words("server.minutes", minutes=minutes)


def _title(name: str, words: Strings) -> str:
    return f"<h3>{escape(words(f'server.{name}'))}</h3>"


def _table(name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Strings) -> str:
    """Draw a table.

    Args:
        name: of its title.
        columns: names of the columns.
        rows: a cell each, as HTML; the first one heads its row.
        words: of the page.
    """
    labels = [escape(words(f"server.column.{one}")) for one in columns]
    titles = "".join(f'<th scope="col">{one}</th>' for one in labels)
    body = "".join(_row(labels, row) for row in rows)
    return (
        f'{_title(name, words)}<table class="server-table server-{name}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _row(labels: Sequence[str], cells: Sequence[str]) -> str:
    first, *others = cells
    drawn = (f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels[1:], others, strict=True))
    return f'<tr><th scope="row">{first}</th>{"".join(drawn)}</tr>'


def _user(name: str, role: str | None, quotas: Quotas, used: Used, words: Strings) -> list[str]:
    most, unfinished = quotas.queued_jobs, {"waiting": used.waiting, "running": used.running}
    waits = (
        words("server.waiting", **unfinished) if most is None else words("server.waiting.most", **unfinished, most=most)
    )
    megabytes = f"{used.stored / MB:.1f}"
    stored = (
        words("server.megabytes", used=megabytes)
        if quotas.storage_mb is None
        else words("server.megabytes.most", used=megabytes, most=f"{quotas.storage_mb:g}")
    )
    cells = [
        name,
        words(f"server.role.{role or 'gone'}"),
        _of(used.images, quotas.images_per_day, words),
        _of(math.ceil(used.seconds), quotas.seconds_per_day, words),
        waits,
        stored,
    ]
    return [escape(one) for one in cells]


def _of(used: int, most: float | None, words: Strings) -> str:
    return str(used) if most is None else words("server.of", used=used, most=f"{most:g}")


def _job(row: QueueRow, moment: float, words: Strings) -> list[str]:
    since = row.created if row.started is None else row.started
    cells = [
        row.owner,
        row.model,
        words(f"server.state.{row.state}", ahead=row.ahead),
        duration(moment - since, words),
        words("server.of", used=row.done, most=row.images),
    ]
    label = escape(words("server.stop.label", owner=row.owner))
    button = (
        f'<button type="button" class="server-stop" data-job="{escape(row.id)}" aria-label="{label}">'
        f"{escape(words('server.stop'))}</button>"
    )
    return [*map(escape, cells), button]


def _device(one: DeviceState, words: Strings) -> str:
    share = one.used / one.total if one.total else 0.0
    used, total, free = (f"{size / GIB:.1f}" for size in (one.used, one.total, one.free))
    said = words("server.memory", used=used, total=total, free=free)
    names = [key if is_loaded else words("server.models.loading", name=key) for key, is_loaded in one.models.items()]
    models = words("server.models", names=", ".join(names)) if names else words("server.models.none")
    title = one.name if one.device == one.name.lower() else f"{one.name} ({one.device})"
    return (
        f'<div class="server-device"><b>{escape(title)}</b> <span>{escape(said)}</span>'
        f'<div class="server-bar" role="meter" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{100 * share:.0f}" '
        f'aria-label="{escape(f"{title}: {said}")}"><i style="width:{100 * share:.1f}%"></i></div>'
        f"<p>{escape(models)}</p></div>"
    )
