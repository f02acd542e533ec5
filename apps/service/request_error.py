"""The errors of a request: an English sentence for logs, the command line and the API; a key and values to translate.

The page's strings hold a sentence for each key, see `apps.studio.problems`.
"""

from __future__ import annotations

from apps.service.usage import UsageError


class TranslatableError(Exception):
    """An error that can be said in another language.

    Args:
        key: which sentence says it; the page's strings hold it as `error.KEY`. Alone, it is the English sentence.
        message: the sentence in English, with the field, the value, what is accepted and the remedy.
        **values: what the sentence mentions; `field` names a field of a request.
    """

    def __init__(self, key: str, message: str | None = None, /, **values: object) -> None:
        super().__init__(key if message is None else message)
        self.key = "" if message is None else key
        self.values = values


class RequestError(TranslatableError, UsageError):
    """A request that can't be served as it is; see `TranslatableError`."""
