"""The tabs, one file each: what a tab asks for beside the prompt and the shared settings."""

from apps.studio.page_values import Values
from apps.studio.tabs import classes, compare, grid, image, inpaint, scales, text, video
from apps.studio.tabs.base import Tab

TABS: dict[str, Tab] = {
    tab.name: tab
    for tab in (text.TAB, image.TAB, inpaint.TAB, video.TAB, classes.TAB, scales.TAB, grid.TAB, compare.TAB)
}
"""The tabs that generate; the gallery shows what they generated."""

__all__ = ["TABS", "Tab", "Values"]
