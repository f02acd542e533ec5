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
from http.cookies import CookieError, SimpleCookie

from apps.api.tokens import TokenTable, User

COOKIE = "tessera-session"
MAX_LOGINS = 1_000
"""Browser sessions that are remembered; beyond them the least recently used one ends."""
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
            while len(self._logins) > MAX_LOGINS:
                self._logins.popitem(last=False)
        return value

    def user(self, cookies: str) -> User | None:
        """Return the user of a session that is still valid.

        Args:
            cookies: the request's `Cookie` header.
        """
        value = cookie_value(cookies)
        if value is None:
            return None
        with self._lock:
            login = self._logins.get(_key(value))
            if login is None:
                return None
            if time.monotonic() - login.used > LIFETIME or self._tokens.named(login.user.name) != login.user:
                del self._logins[_key(value)]
                return None
            login.used = time.monotonic()
            self._logins.move_to_end(_key(value))
            return login.user

    def close(self, cookies: str) -> None:
        """End the session of a request; nothing happens without one."""
        value = cookie_value(cookies)
        if value is not None:
            with self._lock:
                self._logins.pop(_key(value), None)


def set_cookie(value: str, is_secure: bool) -> str:
    """Return the `Set-Cookie` header that starts a session.

    Args:
        value: from `LoginTable.open`.
        is_secure: the page came over TLS, so the browser shall send the cookie over TLS only.
    """
    return f"{COOKIE}={value}; Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if is_secure else "")


def clear_cookie() -> str:
    """Return the `Set-Cookie` header that removes the cookie."""
    return f"{COOKIE}=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0"


def cookie_value(cookies: str) -> str | None:
    """Read our cookie from a `Cookie` header; None if it isn't there."""
    try:
        found = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return None
    return None if found is None or not found.value else found.value


def _key(value: str) -> str:
    """Return what a session is stored under: a copy of the table is of no use to sign in."""
    return hashlib.sha256(value.encode("utf-8", errors="replace")).hexdigest()
