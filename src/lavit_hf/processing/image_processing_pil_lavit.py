"""LaVIT's image processor, PIL backend, complete without torchvision; and what it shares with the other backend.

Callers hand over one image, a flat list, or one list per prompt. Each becomes an upright, checked RGB image. Anything
that cannot become one raises a `ValueError` that says why, so that a bad file never reaches the model.
"""

import base64
import binascii
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from ..modeling.remote_code_mixin import RemoteCodeDictMixin

OneImage = Image.Image | np.ndarray | torch.Tensor | str | bytes | os.PathLike
Images = OneImage | Sequence[OneImage] | Sequence[Sequence[OneImage]]
_ACCEPTED = "a PIL image, a NumPy array, a tensor, a path, a URL or the bytes of an image file"
logger = logging.get_logger(__name__)
# What PIL's decoders raise on damaged files; the exact type depends on the format and on where the damage is.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)
_CHANNEL_COUNTS = (1, 3, 4)
_URL_TIMEOUT = 60.0
_HEAD = 4096  # bytes of a file that say what it is
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_STRIP_PIXELS = 1 << 21
_SCALE_16_BIT = 255 / 65535


def fetch_images(images: Any) -> Any:
    """Opens every path, URL and file content in a single image or a (nested) list; keeps the nesting.

    Raises:
        ValueError: for `None`, an empty list, or anything that is no image.
    """
    images = check_images(images)
    if isinstance(images, list):
        return [fetch_images(image) if not _is_empty_list(image) else [] for image in images]
    return load_image(images) if isinstance(images, (str, bytes, os.PathLike)) else images


def check_images(images: Any) -> Any:
    """As `fetch_images`, but leaves files closed: they are opened one by one, when they are processed."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("Got an empty list of images; pass at least one image.")
        return [check_images(image) if not _is_empty_list(image) else [] for image in images]
    if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray, torch.Tensor)):
        return images
    raise ValueError(f"An image must be {_ACCEPTED}, got {type(images).__name__}.")


def read_size(image: Any) -> tuple[int, int]:
    """Height and width of an image, upright, in pixels."""
    if isinstance(image, (str, bytes, os.PathLike)):
        with load_image(image) as opened:
            return read_size(opened)
    if isinstance(image, Image.Image):
        is_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
        return (image.width, image.height) if is_on_its_side else (image.height, image.width)
    _, height, width = check_array(image).shape
    return height, width


def _is_empty_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value


def is_nested(images: Any) -> bool:
    """Whether the images come as one list per prompt."""
    return isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)


def flatten(images: Any) -> list[Any]:
    """A single image, a batch array [B, C, H, W], or a list of these, as a flat list of single images."""
    if isinstance(images, (list, tuple)):
        return [single for image in images for single in flatten(image)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def load_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Opens an image given as a path, a URL, a `data:` URI, base64 text, or the bytes of a file.

    Unlike `transformers.image_utils.load_image` it keeps the image's mode: converting to RGB is `to_rgb`'s task,
    because PIL's own conversion clips 16-bit images to white.
    """
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), "the given bytes")
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            return _open(io.BytesIO(_download(source)), source)
        if source.startswith("data:"):
            return _open(io.BytesIO(_decode_data_uri(source)), "the data URI")
    path = Path(source)
    if _is_file(path):
        return _open(path, str(path))
    if isinstance(source, str) and not path.suffix and len(source) > 64:
        return _open(io.BytesIO(_decode_base64(source)), "the base64 text")
    raise ValueError(f"Image file not found: {str(source)[:200]!r}.")


def _open(file: io.BytesIO | Path, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be decoded safely: {error}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(_unknown_format(file, name) or f"Cannot read {name} as an image: {error}") from error
    _check_size(image, name)
    return image


def _unknown_format(file: io.BytesIO | Path, name: str) -> str | None:
    """What to do about formats that Pillow does not know, but cameras and drawing programs write."""
    try:
        if isinstance(file, Path):
            with open(file, "rb") as opened:
                head = opened.read(_HEAD)
        else:
            head = file.getvalue()[:_HEAD]
    except OSError:  # what Pillow ran into, too
        return None
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return (
            f"{name} is a HEIC picture, which Pillow does not read by itself: convert it to JPEG or PNG; or, in "
            "Python, pip install pillow-heif, and call pillow_heif.register_heif_opener() first."
        )
    if b"<svg" in head:
        return f"{name} is an SVG drawing, which has no pixels: export it as PNG first (rsvg-convert, Inkscape)."
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or a NUL byte: then it is no path
        return False


def _decode_data_uri(uri: str) -> bytes:
    header, comma, content = uri.partition(",")
    if not comma:
        raise ValueError(f"Cannot decode the data URI {uri[:40]!r}: nothing comes after its header.")
    content = unquote_to_bytes(content).decode("latin-1")
    return _decode_base64(content) if header.endswith(";base64") else content.encode("latin-1")


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"Cannot decode an image from base64 text: {error}") from error


def _download(url: str) -> bytes:
    from huggingface_hub import get_session

    try:
        response: Any = get_session().get(url, timeout=_URL_TIMEOUT, follow_redirects=True)
        response.raise_for_status()
    except Exception as error:  # the client's exception types differ between its versions
        raise ValueError(f"Cannot download an image from {url}: {error}") from error
    return response.content


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"Got an empty image, of size {width}x{height}.")
    # PIL only warns between once and twice this limit, and not at all for an image that is open already.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{name} has {width}x{height} pixels, more than the limit of {limit} that guards against decompression "
            "bombs. If you trust it, raise `PIL.Image.MAX_IMAGE_PIXELS`."
        )


@contextmanager
def _clear_errors(message: str) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"An image is too large to be decoded safely: {error}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"{message}: {error}") from error


def prepare_array(
    image: ImageInput | str | os.PathLike | bytes,
    do_convert_rgb: bool | None,
    input_data_format: str | ChannelDimension | None,
    do_rescale: bool | None,
    size: tuple[int, int] | None = None,
    resample: int | None = None,
) -> np.ndarray:
    """Brings any image to a checked array [C, H, W]; what both backends start with.

    transformers converts arrays to RGB, too, but not in all versions, and not all in the same way.

    Args:
        image: An image, or what `load_image` opens.
        do_convert_rgb: Whether to expand grey, and to composite transparency onto white.
        input_data_format: Where an array's channels are; inferred if not given.
        do_rescale: Whether the values are about to be divided by 255.
        size: Width and height that a picture of PIL's, or of a file, is about to be resized to: it is done here
            where it is converted to RGB, so that no array of the full size is made.
        resample: See `to_rgb`.
    """
    if isinstance(image, (str, os.PathLike, bytes)):
        image = load_image(image)
    if isinstance(image, Image.Image):
        image = np.array(to_rgb(image, size, resample) if do_convert_rgb else decode(image))
        input_data_format = ChannelDimension.LAST
    assert not isinstance(image, list)  # images come one by one
    array = check_array(image, input_data_format)
    if do_rescale:
        _warn_if_already_scaled(array)
    return _array_to_rgb(array) if do_convert_rgb else array


def to_rgb(image: Image.Image, size: tuple[int, int] | None = None, resample: int | None = None) -> Image.Image:
    """Decodes a PIL image, turns it upright by its EXIF orientation, and converts it to RGB.

    Transparency is composited onto white. 16-bit and float images are scaled to 8 bits. Of an animation, the frame
    the image stands at (the first one of a freshly opened file) is used. Large images are converted strip by strip:
    beside the image and its result, little memory is needed.

    Args:
        image: The image.
        size: Width and height to resize to. Grey images are resized before they become RGB, which gives the same.
        resample: A resampling filter of PIL.
    """
    image = decode(image)
    with _clear_errors(f"Cannot convert an image of mode {image.mode!r} to RGB"):
        if image.mode.startswith("I") or image.mode == "F":
            scale = _scale_to_8_bit((np.asarray(strip) for strip, _ in _strips(image)), image.mode)
            image = _by_strips(image, "L", lambda strip: Image.fromarray(_rounded(np.asarray(strip), scale)))
        elif image.mode in ("La", "RGBa") or "A" in image.getbands() or image.info.get("transparency") is not None:
            image = _by_strips(image, "RGB", _onto_white)
        elif image.mode == "1":
            image = image.convert("L")
        elif image.mode not in ("L", "RGB"):
            image = _by_strips(image, "RGB", lambda strip: strip.convert("RGB"))
        if size is not None:
            image = image.resize(size, resample)
        return image.convert("RGB")


def decode(image: Image.Image) -> Image.Image:
    """Reads the pixels of a (possibly lazily opened) PIL image and turns it upright; a copy only if it has to."""
    _check_size(image, "the given image")
    with _clear_errors("Cannot decode an image; its file is truncated or corrupt"):
        image.load()
        is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9)
        return image if is_upright else ImageOps.exif_transpose(image)


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Cuts an image into strips, each with the row at which it begins."""
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top


def _by_strips(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `convert`, which works on each pixel alone, makes of an image."""
    result = Image.new(mode, image.size)
    for strip, top in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _onto_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied alpha: PIL converts these only step by step
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _scale_to_8_bit(pieces: Iterable[np.ndarray], mode: str) -> float:
    """What to multiply pixels of more than 8 bits, or floats, by: what the mode or the values tell."""
    low, high = np.inf, -np.inf
    for values in pieces:
        if not np.isfinite(values).all():
            raise ValueError("it contains NaN or infinite values")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low < 0 or high > 65535:
        raise ValueError(f"its values range from {low:g} to {high:g}, expected 0 to 65535")
    if mode == "F" and high <= 1:
        return 255.0
    if mode in ("I", "F") and high <= 255:  # these modes do not say how many bits are used
        return 1.0
    return _SCALE_16_BIT


def _rounded(values: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def check_array(
    image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None = None
) -> np.ndarray:
    """Checks an array or tensor, and returns it as a channels-first NumPy array of one, three or four channels.

    Args:
        image: [H, W], [H, W, C] or [C, H, W].
        input_data_format: Where the channels are; inferred if not given.

    Returns:
        The array [C, H, W], `uint8` if it came with 16 bits or as booleans, otherwise of its own dtype.
    """
    if isinstance(image, torch.Tensor):
        if image.is_meta or image.layout != torch.strided or image.is_quantized:
            what = f"of layout {image.layout} and dtype {image.dtype}"
            what = "without values, on the device meta" if image.is_meta else what
            raise ValueError(f"An image must be a dense tensor of pixels, got one {what}.")
        image = image.detach().cpu()
        is_narrow = image.is_floating_point() and image.dtype not in (torch.float32, torch.float64)
        image = (image.float() if is_narrow else image).numpy()
    if image.ndim == 2:
        image, input_data_format = image[None], ChannelDimension.FIRST
    if image.ndim != 3:
        raise ValueError(f"An image must have 2 or 3 dimensions, got an array of shape {image.shape}.")
    if 0 in image.shape:
        raise ValueError(f"Got an empty image, of shape {image.shape}.")
    data_format = ChannelDimension(input_data_format or _infer_format(image.shape))
    if data_format == ChannelDimension.LAST:
        image = np.moveaxis(image, -1, 0)
    if image.shape[0] not in _CHANNEL_COUNTS:
        raise ValueError(f"An image must have 1, 3 or 4 channels, got {image.shape[0]} in {data_format.value} layout.")
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    elif image.dtype == np.uint16:  # row by row: all of it in float64 would be four times as large
        image = np.stack([np.concatenate([_rounded(row[None], _SCALE_16_BIT) for row in plane]) for plane in image])
    elif image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError("An image contains NaN or infinite values.")
    elif image.dtype.kind not in "uif":
        raise ValueError(f"An image must hold numbers, got an array of dtype {image.dtype}.")
    return image


def _infer_format(shape: tuple[int, ...]) -> ChannelDimension:
    first, last = shape[0] in _CHANNEL_COUNTS, shape[-1] in _CHANNEL_COUNTS
    if first and last and shape[0] == 1 and shape[-1] != 1:
        return ChannelDimension.LAST  # a picture one pixel high is likelier than one three pixels wide in grey
    if first:
        return ChannelDimension.FIRST
    if last:
        return ChannelDimension.LAST
    raise ValueError(f"An image must have 1, 3 or 4 channels as its first or last dimension, got shape {shape}.")


def _array_to_rgb(image: np.ndarray) -> np.ndarray:
    if len(image) == 1:
        return np.repeat(image, 3, axis=0)
    if len(image) == 3:
        return image
    white = 1.0 if image.dtype.kind == "f" and image.max() <= 1 else 255.0
    if image.min() < 0 or image.max() > white:
        raise ValueError(
            f"An RGBA image must have values from 0 to {white:g}, got a range of {image.min()} to {image.max()}."
        )
    alpha = image[3:].astype(np.float64) / white
    composited = image[:3] * alpha + white * (1 - alpha)
    return (composited if image.dtype.kind == "f" else np.rint(composited)).astype(image.dtype)


def _warn_if_already_scaled(image: np.ndarray) -> None:
    """A float image in [0, 1] would be divided by 255 once more and become nearly black: say so."""
    if image.dtype.kind == "f" and image.min() >= 0 and 0 < image.max() <= 1:
        logger.warning_once(
            "An image of floats between 0 and 1 is about to be rescaled by 1/255 again. "
            "If its pixel values are scaled already, pass `do_rescale=False`."
        )


class LavitImageDefaults(RemoteCodeDictMixin):
    """What the two backends share: the original's preprocessing, and which inputs are taken."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, is_used in (
            ("rescale_factor", self.do_rescale),
            ("image_mean", self.do_normalize),
            ("image_std", self.do_normalize),
        ):
            value = getattr(self, name)
            has_channels = isinstance(value, (list, tuple)) and name != "rescale_factor"
            values = value if has_channels else [value]
            is_number = [isinstance(one, Real) and not isinstance(one, bool) and isfinite(one) for one in values]
            is_misfit = (has_channels and len(values) != 3) or (name == "image_std" and 0 in values)
            if is_used and (is_misfit or not all(is_number)):
                raise ValueError(
                    f"{name} must be a number, or one per channel for mean and std (which is not 0); got {value!r}."
                )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths, URLs and file contents; images pass through. The nesting is kept."""
        return fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        flat = flatten(check_images(images))  # opened in `process_image`, so that one at a time is in memory
        if not flat:
            raise ValueError("Got no images; pass at least one.")
        return flat


class LavitImageProcessorPil(LavitImageDefaults, PilBackend):
    """Converts to RGB, squashes (no crop) to a fixed size, scales to [0, 1] and normalizes with CLIP's statistics.

    Takes PIL images, NumPy arrays, tensors, paths, URLs and file contents, alone or in (nested) lists.
    """

    def __init__(self, **kwargs: Unpack[ImagesKwargs]) -> None:
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Returns one image as a checked array [C, H, W]."""
        size, resample = kwargs.get("size"), kwargs.get("resample")
        resized = None
        if kwargs.get("do_resize") and isinstance(resample, int) and size is not None and size.height and size.width:
            resized = (size.width, size.height)
        array = prepare_array(image, do_convert_rgb, input_data_format, kwargs.get("do_rescale"), resized, resample)
        return super().process_image(array, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, **kwargs)


__all__ = ["LavitImageProcessorPil"]
