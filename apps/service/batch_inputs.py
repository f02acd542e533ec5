"""What a batch is generated from: the images that a request names, at its size, and what stays of them."""

from __future__ import annotations

from PIL import Image

from apps.service.inference import BatchInputs, BatchResult
from apps.service.masked_area import cut_out, mask_edge
from apps.service.model_pool import LoadedModel
from apps.service.outpaint import blend, mask_of, pad_for_outpainting, soft_mask
from apps.service.requests import AnyRequest
from apps.service.uploaded_clips import split_frames
from apps.service.uploads import UploadStore


def batch_inputs(request: AnyRequest, seeds: tuple[int, ...], model: LoadedModel, uploads: UploadStore) -> BatchInputs:
    """Fetch the images that a request names, laid out at the size of the request.

    Args:
        request: filled in, see `apps.service.defaults`.
        seeds: of the noise, one an image.
        model: gives the size that the request leaves open.
        uploads: images handed in.
    """
    width, height = getattr(request, "width", None), getattr(request, "height", None)
    size = (width or model.width, height or model.side)

    def fetch(field: str) -> Image.Image | None:
        name = getattr(request, field, None)
        picture = None if name is None else uploads.get(name)
        return picture if picture is None or picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)

    if getattr(request, "image", None) is None or "mask" not in type(request).model_fields:
        video = _video(request, size, uploads)
        return BatchInputs(
            request=request, seeds=seeds, image=fetch("image"), last_image=fetch("last_image"), video=video
        )
    return _masked(request, seeds, size, bool(model.sizes), uploads)


def _masked(
    request: AnyRequest, seeds: tuple[int, ...], size: tuple[int, int], keep_shape: bool, uploads: UploadStore
) -> BatchInputs:
    """Lay out an image of which a part is generated, and the mask of that part."""
    picture = uploads.get(getattr(request, "image"))  # noqa: B009
    name, expand = getattr(request, "mask"), getattr(request, "expand")  # noqa: B009
    grow, blur = getattr(request, "mask_grow", None) or 0, getattr(request, "mask_blur", None) or 0
    mask, padding = None if name is None else uploads.get(name), getattr(request, "mask_padding", None)
    if padding is not None and mask is not None:
        area = cut_out(picture, mask_edge(mask, picture.size, grow, blur), size, padding)
        return BatchInputs(request=request, seeds=seeds, image=area.image, mask=area.mask, area=area)
    padded = pad_for_outpainting(picture, mask, size, expand, keep_shape or expand is not None)
    if not grow and not blur:
        return BatchInputs(request=request, seeds=seeds, image=padded.image, mask=padded.mask)
    alpha = soft_mask(padded.mask, grow, blur)
    return BatchInputs(request=request, seeds=seeds, image=padded.image, mask=mask_of(alpha), alpha=alpha)


def _video(request: AnyRequest, size: tuple[int, int], uploads: UploadStore) -> tuple[Image.Image, ...]:
    """Fetch the frames of the clip that a request names; frames that have the size stay as they are."""
    name, count = getattr(request, "video", None), getattr(request, "video_frames", None)
    if name is None or count is None:
        return ()
    frames = split_frames(uploads.get(name), count)[: getattr(request, "frames", None)]
    return tuple(one if one.size == size else one.resize(size, Image.Resampling.LANCZOS) for one in frames)


def keep_rest(inputs: BatchInputs, result: BatchResult) -> BatchResult:
    """After inpainting, lay what is kept over the result, which pipelines of diffusers change a little.

    Args:
        inputs: what was generated from.
        result: its first frames are replaced.
    """
    if inputs.image is None or inputs.mask is None:
        return result
    from pipelines.inputs.inpaint import keep_pixels

    for frames in result.pictures:
        if inputs.alpha is None:
            frames[0] = keep_pixels(inputs.image, frames[0], inputs.mask)
        else:
            frames[0] = blend(inputs.image, frames[0], inputs.alpha)
    return result
