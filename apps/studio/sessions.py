"""Who is on the page: whose jobs it shows, and what the user may do."""

from __future__ import annotations

import gradio as gr

from apps.api.tokens import TokenTable
from apps.studio.page_values import PageError

LOCAL = "local"
"""Who owns jobs on a server without tokens."""


class Sessions:
    """The users behind the open pages.

    Args:
        tokens: the users; None for a server that asks nobody.
    """

    def __init__(self, tokens: TokenTable | None) -> None:
        self._tokens = tokens

    def user(self, request: gr.Request) -> str:
        """Return whose queue and newest images a page shows; empty for somebody who isn't a user any more."""
        if self._tokens is None:
            return LOCAL
        user = self._tokens.named(request.username)
        return "" if user is None else user.name

    def viewer(self, request: gr.Request) -> str | None:
        """Return whose images the gallery of a page may show: a name, or None for everybody's."""
        if self._tokens is None:
            return None
        user = self._tokens.named(request.username)
        return "" if user is None else None if user.may("admin") else user.name

    @property
    def table(self) -> TokenTable | None:
        """The users; None for a server that asks nobody."""
        return self._tokens

    @property
    def has_users(self) -> bool:
        """Whether people sign in."""
        return self._tokens is not None

    def may_generate(self, request: gr.Request) -> bool:
        """Whether the user of a page may change anything on the server."""
        user = None if self._tokens is None else self._tokens.named(request.username)
        return self._tokens is None or (user is not None and user.may("generate"))

    def submitter(self, request: gr.Request) -> str:
        """Return in whose name a page asks for images and changes the queue.

        Raises:
            PageError: the user may only look.
        """
        if not self.may_generate(request):
            raise PageError("no_rights")
        return self.user(request)
