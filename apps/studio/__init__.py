"""The studio: a page in the browser that generates what is typed into it."""
