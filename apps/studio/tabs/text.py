"""Text to image: the prompt and the shared settings are all it needs."""

from __future__ import annotations

from apps.studio.tabs.base import Tab

TAB = Tab(
    "text",
    ("text_to_image", "next_scale_text"),
    lambda words: {},
    lambda values: {},
    lambda settings: {},
    output="images",
)
