"""Names of Hub repositories, and commits to which they are pinned: `owner/name@0123...`, 40 hex digits."""

from __future__ import annotations

import re
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(name: str) -> tuple[str, str | None]:
    """Take the commit off a name.

    Args:
        name: of whatever can be loaded; only Hub ids can be pinned. A folder or file that exists is itself, with any @
            in its name.

    Returns:
        The name without it, and the commit; None for a name that isn't pinned.

    Raises:
        ValueError: what stands behind @ is no commit, such as a branch or a tag, which move.
    """
    repository, sign, revision = name.partition("@")
    if not sign or repository.count("/") != 1 or Path(name).expanduser().exists():
        return name, None
    if COMMIT.fullmatch(revision.lower()) is None:
        raise ValueError(
            f"{name!r} is pinned to {revision!r}, which is no commit: branches, tags and short hashes can move. Write "
            f"the 40 hex digits that https://huggingface.co/{repository}/commits shows, or {repository!r} for the "
            "newest of its main branch."
        )
    return repository, revision.lower()
