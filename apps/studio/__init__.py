"""The studio: a page in the browser that paints what is typed into it."""
