"""The look of the studio: warm paper, ink, and the terracotta of a mosaic; light and dark.

Colours live here, as Gradio's theme variables; shapes and places live in `static/studio.css`.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from apps.service import comparison_page

STATIC = Path(__file__).parent / "static"
CSS = STATIC / "studio.css"
SCRIPT = STATIC / "studio.js"
BRUSH = STATIC / "brush.js"
LANGUAGE = STATIC / "language.js"
FILES = STATIC / "files.js"
CAPTIONS = STATIC / "captions.js"
SCRIPTS = (
    BRUSH,
    STATIC / "brush_view.js",
    STATIC / "outpaint.js",
    CAPTIONS,
    STATIC / "tabs.js",
    STATIC / "gallery.js",
    STATIC / "prompt.js",
    STATIC / "server.js",
    comparison_page.SCRIPT,
)
"""What runs before the page is drawn, beside the scripts that are told something of the server."""
STYLES = (
    comparison_page.STYLE,
    CSS,
    STATIC / "brush.css",
    STATIC / "prompt.css",
    STATIC / "speed.css",
    STATIC / "models.css",
    STATIC / "server.css",
    STATIC / "gallery.css",
)
"""Style sheets of the page; comparisons have the same in the files that they are saved in."""

PAPER, CARD, SUNK, LINE, INK, SOFT = "#f6f3ee", "#ffffff", "#f3efe8", "#e6dfd4", "#26221d", "#6d6459"
NIGHT, NIGHT_CARD, NIGHT_SUNK, NIGHT_LINE, CHALK, DIM = (
    "#141318",
    "#1d1c22",
    "#26252c",
    "#34323b",
    "#f0ece6",
    "#a29c97",
)
CLAY = gr.themes.Color(
    name="clay",
    c50="#fdf3ef",
    c100="#fbe3da",
    c200="#f6c7b5",
    c300="#efa488",
    c400="#e57e58",
    c500="#d9603a",
    c600="#c24c28",
    c700="#a13d20",
    c800="#82341f",
    c900="#6b2e1e",
    c950="#3a150c",
)


def theme() -> gr.themes.Base:
    """Return the theme; its fonts come with Gradio, so that the page asks no other server for anything."""
    base = gr.themes.Base(
        primary_hue=CLAY,
        secondary_hue=CLAY,
        neutral_hue="stone",
        radius_size="lg",
        # Bold and not semi-bold: of that weight Gradio ships a file that lacks letters.
        font=(gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=(gr.themes.LocalFont("IBM Plex Mono", (400, 700)), "ui-monospace", "monospace"),
    )
    return base.set(
        body_background_fill=PAPER,
        body_background_fill_dark=NIGHT,
        body_text_color=INK,
        body_text_color_dark=CHALK,
        body_text_color_subdued=SOFT,
        body_text_color_subdued_dark=DIM,
        background_fill_primary=CARD,
        background_fill_primary_dark=NIGHT_CARD,
        background_fill_secondary=SUNK,
        background_fill_secondary_dark=NIGHT_SUNK,
        border_color_primary=LINE,
        border_color_primary_dark=NIGHT_LINE,
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_color=SOFT,
        block_title_text_color_dark=DIM,
        block_title_text_size="13px",
        block_title_text_weight="600",
        input_background_fill=SUNK,
        input_background_fill_dark=NIGHT_SUNK,
        input_background_fill_focus=CARD,
        input_background_fill_focus_dark=NIGHT_SUNK,
        input_border_color=LINE,
        input_border_color_dark=NIGHT_LINE,
        input_border_color_focus="*primary_400",
        input_border_color_focus_dark="*primary_500",
        input_shadow="none",
        input_shadow_focus="0 0 0 3px color-mix(in srgb, *primary_400 22%, transparent)",
        input_placeholder_color="#716a5f",
        input_placeholder_color_dark="#96909a",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill=SUNK,
        button_secondary_background_fill_hover=LINE,
        button_secondary_background_fill_dark=NIGHT_SUNK,
        button_secondary_background_fill_hover_dark=NIGHT_LINE,
        button_secondary_text_color=INK,
        button_secondary_text_color_dark=CHALK,
        button_transform_hover="none",
        slider_color="*primary_500",
        checkbox_label_background_fill=SUNK,
        checkbox_label_background_fill_dark=NIGHT_SUNK,
        checkbox_label_background_fill_selected="*primary_100",
        checkbox_label_background_fill_selected_dark="*primary_950",
        checkbox_label_border_color=LINE,
        checkbox_label_border_color_dark=NIGHT_LINE,
        checkbox_label_border_color_selected="*primary_400",
        checkbox_label_text_color_selected="*primary_800",
        checkbox_label_text_color_selected_dark="*primary_200",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_500",
        checkbox_label_shadow="none",
    )
