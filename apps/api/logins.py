"""Browser sessions: a cookie that stands for one token of one user, and ends with it.

A user signs in on a page with name and token and gets a random cookie (256 bits, HttpOnly, SameSite=Lax). The cookie
is valid as long as the user's row in the file of users is the one it was issued for: a removed user, a re-issued token
or a changed role ends it at the next request.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from apps.api.tokens import TokenTable, User

COOKIE = "tessera-session"
MAX_LOGINS = 1_000
"""Browser sessions that are remembered; beyond them the least recently used one ends."""
MAX_LOGINS_PER_USER = 20
"""Of them one user's; beyond them the user's least recently used one ends, and nobody else's."""
MOST_VALUES = 8
"""Cookies of our name that are looked at in one request."""
LIFETIME = 30 * 24 * 3_600.0
"""Seconds until a session that is not used ends."""


@dataclass(slots=True)
class _Login:
    user: User
    used: float


class LoginTable:
    """The browser sessions of a server; kept in memory, so a restart ends them.

    Args:
        tokens: the users and their tokens.
    """

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens
        self._logins: OrderedDict[str, _Login] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, name: str, token: str) -> str | None:
        """Start a session.

        Args:
            name: of the user.
            token: as `tessera token` showed it.

        Returns:
            The value of the cookie; None if name and token don't belong together.
        """
        user = self._tokens.find(token, name)
        if user is None:
            return None
        value = secrets.token_urlsafe(32)
        with self._lock:
            self._logins[_key(value)] = _Login(user, time.monotonic())
            own = [key for key, login in self._logins.items() if login.user.name == user.name]
            for key in own[:-MAX_LOGINS_PER_USER]:
                del self._logins[key]
            while len(self._logins) > MAX_LOGINS:
                self._logins.popitem(last=False)
        return value

    def user(self, cookies: str) -> User | None:
        """Return the user of a session that is still valid.

        Args:
            cookies: the request's `Cookie` header.
        """
        for value in cookie_values(cookies):
            user = self._user_of(_key(value))
            if user is not None:
                return user
        return None

    def _user_of(self, key: str) -> User | None:
        with self._lock:
            login = self._logins.get(key)
            if login is None:
                return None
            if time.monotonic() - login.used > LIFETIME or self._tokens.named(login.user.name) != login.user:
                del self._logins[key]
                return None
            login.used = time.monotonic()
            self._logins.move_to_end(key)
            return login.user

    def close(self, cookies: str) -> None:
        """End the session of a request; nothing happens without one."""
        with self._lock:
            for value in cookie_values(cookies):
                self._logins.pop(_key(value), None)


def set_cookie(value: str, is_secure: bool) -> str:
    """Return the `Set-Cookie` header that starts a session.

    Args:
        value: from `LoginTable.open`.
        is_secure: the page came over TLS, so the browser should send the cookie over TLS only.
    """
    return f"{COOKIE}={value}; Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if is_secure else "")


def clear_cookie() -> str:
    """Return the `Set-Cookie` header that removes the cookie."""
    return f"{COOKIE}=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0"


def cookie_values(cookies: str) -> list[str]:
    """Read our cookie from a `Cookie` header, whatever the others look like.

    Browsers send cookies of all servers of a host, whatever the port, so the header may hold what `SimpleCookie` gives
    up on, and our name more than once.

    Args:
        cookies: the header.

    Returns:
        Its values in their order; empty if it isn't there.
    """
    pairs = (part.partition("=") for part in cookies.split(";"))
    return [value.strip() for name, _, value in pairs if name.strip() == COOKIE and value.strip()][:MOST_VALUES]


def _key(value: str) -> str:
    """Return what a session is stored under: a copy of the table is of no use to sign in."""
    return hashlib.sha256(value.encode("utf-8", errors="replace")).hexdigest()
