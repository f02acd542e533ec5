"""Who may do what: a file of users with the hashes of their tokens.

Tokens are drawn by us, 256 bits each, and never chosen by people; that is why one round of a salted hash is enough to
keep a stolen file useless. A user's token is also the password of the web page. A row holds the user's quotas too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from apps.service.quotas import NO_QUOTAS, Quotas

Role = Literal["view", "generate", "admin"]
RANKS: dict[Role, int] = {"view": 0, "generate": 1, "admin": 2}
"""What a role may do includes all below: see one's own jobs; submit and stop them; see and stop everybody's."""
OLD_ROLES = {"watch": "view", "paint": "generate"}
"""Names of roles in files and commands of earlier versions."""
MAX_BYTES = 1024 * 1024
MAX_TOKEN_CHARS = 256
"""Longer ones are nobody's; they are not hashed, because that is done once for each user."""


class User(Quotas):
    """One row of the file; its quotas are fields of it, and absent where there is no limit.

    Attributes:
        name: of the user, who owns jobs by it.
        role: what it may do.
        salt: 32 hex digits.
        digest: SHA-256 of salt and token, 64 hex digits.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")
    role: Role = "generate"
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("role", mode="before")
    @classmethod
    def _rename(cls, role: object) -> object:
        """Read a role by its earlier name too."""
        return OLD_ROLES.get(role, role) if isinstance(role, str) else role

    def may(self, role: Role) -> bool:
        """Whether the user's role includes another."""
        return RANKS[self.role] >= RANKS[role]

    @property
    def quotas(self) -> Quotas:
        """What the user may use."""
        return Quotas(**{name: getattr(self, name) for name in Quotas.model_fields})


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    users: list[User] = Field(default_factory=list, max_length=1000)


class TokenTable:
    """The users of a server.

    Args:
        file: written by `add_user`; it is read again when it changes.

    Raises:
        ValueError: no such file, it isn't of this form, or others may read it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stamp = -1
        self._users: list[User] = []
        self._refresh()
        if not self._users:
            raise ValueError(f"{file} has no users; add one: tessera token NAME --auth-file {file}")

    def find(self, token: str, name: str | None = None) -> User | None:
        """Return the user of a token, or None.

        Args:
            token: as presented.
            name: the user it must belong to, when one was named.
        """
        self._refresh()
        if len(token) > MAX_TOKEN_CHARS:
            return None
        found = None
        for user in self._users:  # all of them, so that the time tells nothing
            right = hmac.compare_digest(_digest(user.salt, token), user.digest)
            if right and name in (None, user.name):
                found = user
        return found

    def named(self, name: str | None) -> User | None:
        """Return a user by name, or None."""
        self._refresh()
        return next((user for user in self._users if user.name == name), None)

    @property
    def users(self) -> tuple[User, ...]:
        """All users, in the order of the file."""
        self._refresh()
        return tuple(self._users)

    def quotas_of(self, name: str) -> Quotas:
        """Return what a user may use; of somebody who isn't in the file any more nothing is known.

        Raises:
            RuntimeError: the file can't be read any more.
        """
        try:
            user = self.named(name)
        except ValueError as error:  # names the file, which is the owner's business: a job's failure should not
            raise RuntimeError("The file of users can't be read, so nobody's quotas are known.") from error
        return NO_QUOTAS if user is None else user.quotas

    def _refresh(self) -> None:
        with self._lock:
            stamp = self._file.stat().st_mtime_ns if self._file.is_file() else 0
            if stamp != self._stamp:
                self._users = read_users(self._file)
                self._stamp = stamp


def read_users(file: Path) -> list[User]:
    """Read a file of users.

    Raises:
        ValueError: no such file, it isn't of this form, or others may read it.
    """
    if not file.is_file():
        raise ValueError(f"No file {file}; make one: tessera token NAME --auth-file {file}")
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise ValueError(f"{file} can be read by other users of this machine; run: chmod 600 {file}")
    try:
        return _File.model_validate_json(file.read_bytes()[:MAX_BYTES]).users
    except ValidationError as error:
        raise ValueError(f"{file} is no file of users; make one: tessera token NAME --auth-file {file}") from error


def add_user(file: Path, name: str, role: str = "generate", quotas: Mapping[str, float | None] | None = None) -> str:
    """Add a user, or give one a new token and role; quotas that are not given stay as they are.

    Args:
        file: created if absent, readable by its owner only.
        name: letters, digits and `_.-`, at most 40.
        role: what it may do.
        quotas: field of `Quotas` -> value; None takes a quota away.

    Returns:
        The token, which is stored nowhere.

    Raises:
        ValueError: the name, the role or a quota isn't allowed, or the file isn't of this form.
    """
    token, salt = f"tessera-{secrets.token_urlsafe(32)}", secrets.token_hex(16)
    users = read_users(file) if file.exists() else []
    kept = next((user.quotas.model_dump() for user in users if user.name == name), {})
    given = {"name": name, "role": role, "salt": salt, "digest": _digest(salt, token)}
    try:
        user = User.model_validate({**kept, **(quotas or {}), **given})
    except ValidationError as error:
        wrong = next((str(one["loc"][0]) for one in error.errors() if one["loc"][0] in Quotas.model_fields), None)
        if wrong is not None:
            value = (quotas or {})[wrong]
            raise ValueError(f"{wrong} is {value!r}; give a number from 0, or none for no limit.") from error
        if RANKS.keys().isdisjoint({role, OLD_ROLES.get(role)}):
            raise ValueError(f"role is {role!r}; choose among {', '.join(RANKS)}.") from error
        raise ValueError(f"{name!r} is no name: use letters, digits and _.-, at most 40.") from error
    others = [other for other in users if other.name != name]
    text = json.dumps({"users": [one.model_dump(exclude_none=True) for one in (*others, user)]}, indent=2)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text + "\n")
    partial.replace(file)
    return token


def _digest(salt: str, token: str) -> str:
    return hashlib.sha256(f"{salt}:{token}".encode("utf-8", errors="replace")).hexdigest()
