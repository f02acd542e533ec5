"""What schemathesis sends as images in forms and bodies: real ones of two sizes, opaque or not, and no images."""

import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image

from apps.api.schema import PICTURES

SIDES = (32, 64)
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


def picture(form: str, side: int, opacity: int) -> bytes:
    """Return a file of an image of one colour."""
    image = Image.new("RGBA", (side, side), (200, 30, 30, opacity))
    file = io.BytesIO()
    (image.convert("RGB") if form == "JPEG" else image).save(file, form)
    return file.getvalue()


for kind in PICTURES:
    files = [picture(FORMATS[kind], side, opacity) for side in SIDES for opacity in (0, 255)]
    schemathesis.openapi.media_type(kind, st.one_of(st.sampled_from(files), st.binary(max_size=64)))
