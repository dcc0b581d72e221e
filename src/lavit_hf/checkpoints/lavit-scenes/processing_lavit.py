"""LaVIT's processor: images and text to what the model takes, in one of three forms.

Made by lavit-hf from its own modules: change it there. License: Apache-2.0.
"""

from __future__ import annotations

import base64
import binascii
import copy
import io
import json
import numpy as np
import os
import re
import struct
import torch
import zlib
from PIL import Image, ImageOps
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import ChannelDimension, ImageInput, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging, requires_backends
from typing import Any, Literal, NamedTuple, TypeVar, overload
from .configuration_lavit import IS_PACKAGE, LavitConfig, RemoteCodeDictMixin, RemoteCodeMixin
from .modeling_lavit import GENERATION_MODES, _HUB_KWARGS


Checkpoint = tuple[str | os.PathLike, dict[str, Any]]


def check_visual_tokenizer(visual_tokenizer: Any, codebook_size: int, image_seq_length: int) -> Any:
    """Returns the visual tokenizer (of a whole model: its part) after checking that it fits the processor.

    Raises:
        TypeError: If it is something else, such as a path.
        ValueError: If its sizes do not fit.
    """
    if visual_tokenizer is None:
        return None
    part = getattr(visual_tokenizer, "visual_tokenizer", visual_tokenizer)
    if not all(callable(getattr(part, name, None)) for name in ("embed", "encode")):
        raise TypeError(
            "`visual_tokenizer` must be a LavitVisualTokenizer or a model that has one, got "
            f"{type(visual_tokenizer).__name__}. From a path, load it with `LavitVisualTokenizer.from_pretrained`."
        )
    config = getattr(part, "config", None)
    for name, expected, what in (
        ("codebook_size", codebook_size, "tokenizer's visual vocabulary"),
        ("num_patches", image_seq_length, "processor's `image_seq_length`"),
    ):
        if config is not None and getattr(config, name, expected) != expected:
            raise ValueError(
                f"The visual tokenizer does not fit this processor: its {name} is {getattr(config, name)}, "
                f"the {what} is {expected}."
            )
    return part


def load_visual_tokenizer(checkpoint: Checkpoint | None) -> Any:
    """The visual tokenizer of a processor's own checkpoint, in fp32: codes are exact.

    Args:
        checkpoint: Directory or Hub id, and what locates it; `None` if the processor was not loaded from one.
    """
    if checkpoint is None:
        raise ValueError(
            "Discrete images need a visual tokenizer: pass `visual_tokenizer=`, or load the processor with "
            "`from_pretrained` from a checkpoint that has one."
        )
    from .modeling_lavit import LavitVisualTokenizer

    path, hub_kwargs = checkpoint
    try:
        return LavitVisualTokenizer.from_pretrained(path, dtype=torch.float32, **hub_kwargs).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Discrete images need a visual tokenizer, and none could be loaded from the processor's own directory, "
            f"{path}: pass `visual_tokenizer=` to the processor. ({error})"
        ) from error


# Renders [image, "what is it?"] as the release's VQA prompt, "<image>Question: what is it? Answer:"; an image alone is
# its caption prompt. Only the answer to a text question starts with " Answer:", so [image] -> "a cat" is a caption.
# With generation_mode="image" a user's text describes what to draw and stays as it is.
DEFAULT_CHAT_TEMPLATE = """\
{%- set drawing = generation_mode is defined and generation_mode == "image" -%}
{%- set ns = namespace(after_text=false, question=false, opened=false) -%}
{%- for message in messages -%}
    {%- if message.content is string -%}
        {%- set parts = [{"type": "text", "text": message.content}] -%}
    {%- else -%}
        {%- set parts = message.content -%}
    {%- endif -%}
    {%- set ns.opened = false -%}
    {%- if message.role == "user" -%}
        {%- set ns.question = false -%}
    {%- endif -%}
    {%- for part in parts -%}
        {%- if part.type == "image" -%}
            {{- "<image>" -}}
            {%- set ns.after_text = false -%}
        {%- elif part.type == "text" -%}
            {%- if message.role == "user" -%}
                {{- (" " if ns.after_text else "") + ("" if ns.opened or drawing else "Question: ") + part.text -}}
                {%- set ns.opened = true -%}
                {%- set ns.question = not drawing -%}
            {%- elif message.role == "assistant" -%}
                {{- " Answer:" if ns.question else "" -}}
                {%- generation -%}
                    {{- (" " if ns.question or ns.after_text else "") + part.text -}}
                {%- endgeneration -%}
                {%- set ns.question = false -%}
            {%- else -%}
                {{- (" " if ns.after_text else "") + part.text -}}
            {%- endif -%}
            {%- set ns.after_text = true -%}
        {%- else -%}
            {{- raise_exception("LaVIT's chat template takes text and images, not " ~ part.type) -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{{- " Answer:" if add_generation_prompt and ns.question else "" -}}
"""


# Set while a chat is tokenized: the character that stands for a "<" typed in it. transformers renders the chat and
# calls the processor in one go; an argument to hand the character on by would be one that all callers see.
hidden_bracket: ContextVar[str | None] = ContextVar("hidden_bracket", default=None)


_MEDIA_KEYS = ("image", "url", "path", "base64", "image_url")


_PRIVATE_USE = range(0xF0000, 0xFFFFE)


def hide_brackets(*values: Any) -> tuple[str, list[Any]]:
    """Replaces "<" by another character in all text of a chat, so that no text in it can spell `<image>`.

    After rendering, every "<image>" left is the template's own, however the template joined the pieces. The other
    character is one that does not occur in the chat, so `show_brackets` restores the text exactly; that it is one
    character for one keeps character offsets valid.

    Args:
        values: Conversations, tools, ... What stands at the keys of images (paths, URLs) is left as it is.

    Returns:
        The character used for "<", and the values with it.
    """
    used = {character for value in values for text in _texts(value) for character in text}
    hidden = next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return hidden, [_replace(value, hidden) for value in values]


def show_brackets(text: str, hidden: str | None) -> str:
    """Undoes `hide_brackets` in a part of the rendered chat."""
    return text if hidden is None else text.replace(hidden, "<")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _MEDIA_KEYS:
                yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _replace(value: Any, hidden: str) -> Any:
    if isinstance(value, str):
        return value.replace("<", hidden)
    if isinstance(value, dict):
        return {key: item if key in _MEDIA_KEYS else _replace(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(item, hidden) for item in value]
    return value


class IdRun(NamedTuple):
    """Consecutive ids of one kind.

    Attributes:
        kind: `"text"`; `"image"`; or `"features"`, an image of the prompt that entered as continuous features.
        ids: Text ids; codes (0 to K-1); or nothing for `"features"`.
    """

    kind: Literal["text", "image", "features"]
    ids: list[int]


class VisualIds(NamedTuple):
    """The ids that tell images from text: V, V+1, V+2 (code 0) and V+2+K."""

    start: int
    end: int
    first_code: int
    placeholder: int


def split_ids(ids: Iterable[int], visual: VisualIds, special_ids: Collection[int]) -> list[IdRun]:
    """Splits a row of ids into runs of text and images, in order.

    An image goes from its start to its end, or to the end of the row if it was cut off. Ids of text, and further
    starts, do not belong there; a model that is free to generate them may do so, and they are dropped as the release
    does. Codes outside start and end are an image, too, as in prompts for drawing; such a one ends at the next text.

    Args:
        ids: Prompt and new ids, or new ids alone.
        visual: The ids that matter.
        special_ids: The text tokenizer's control ids (padding, ...); between bare codes they are strays.
    """
    runs: list[IdRun] = []
    state = "text"  # or "image" between start and end, "bare" in codes without a start
    for index in ids:
        if index == visual.start:
            if state != "image":
                runs.append(IdRun("image", []))
                state = "image"
        elif index == visual.end:
            state = "text"
        elif visual.first_code <= index < visual.placeholder:
            if state == "text":
                runs.append(IdRun("image", []))
                state = "bare"
            runs[-1].ids.append(index - visual.first_code)
        elif index == visual.placeholder:
            if state == "image":
                runs[-1] = IdRun("features", [])
        elif state == "text" or (state == "bare" and index not in special_ids):
            if state == "bare" or not runs or runs[-1].kind != "text":
                runs.append(IdRun("text", []))
            state = "text"
            runs[-1].ids.append(index)
    return runs


def as_rows(ids: Any) -> list[list[int]]:
    """Ids of one sequence or several (a tensor, an array, a list of these) as lists of ints."""
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not values or isinstance(values[0], Integral):
        return [values]
    return [row.tolist() if hasattr(row, "tolist") else list(row) for row in values]


def last_image(runs: list[IdRun]) -> torch.Tensor:
    """The codes of the last image; none if there is no image."""
    return next((_codes(run) for run in reversed(runs) if run.kind != "text"), torch.empty(0, dtype=torch.long))


def draw_images(codes: list[torch.Tensor], pixel_decoder: Callable[..., Any] | None) -> list[Any]:
    """The images of a list of codes, all decoded in one call; without a pixel decoder, the codes."""
    if pixel_decoder is None or not codes:
        return list(codes)
    images = pixel_decoder(codes=codes).images
    if len(images) != len(codes):
        raise ValueError(f"The pixel decoder returned {len(images)} image(s) for {len(codes)} lists of codes.")
    return list(images)


def join_runs(
    rows: list[list[IdRun]], decode: Callable[[list[int]], str], pixel_decoder: Callable[..., Any] | None
) -> list[list[Any]]:
    """Per row its texts and images in order, without empty texts and without images that have no codes to show."""
    codes = [_codes(run) for runs in rows for run in runs if run.kind == "image"]
    images = iter(draw_images(codes, pixel_decoder))
    joined: list[list[Any]] = []
    for runs in rows:
        parts = [next(images) if run.kind == "image" else decode(run.ids) for run in runs if run.kind != "features"]
        joined.append([part for part in parts if not isinstance(part, str) or part])
    return joined


def _codes(run: IdRun) -> torch.Tensor:
    return torch.tensor(run.ids, dtype=torch.long)


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
            return _open(io.BytesIO(_decode_base64(source.partition(",")[2])), "the data URI")
    path = Path(source)
    if _is_file(path):
        return _open(path, str(path))
    if isinstance(source, str) and not path.suffix and len(source) > 64:
        return _open(io.BytesIO(_decode_base64(source)), "the base64 text")
    raise ValueError(f"Image file not found: {str(source)[:200]!r}.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes a PIL image, turns it upright by its EXIF orientation, and converts it to RGB.

    Transparency is composited onto white. 16-bit and float images are scaled to 8 bits. Of an animation, the frame
    the image stands at (the first one of a freshly opened file) is used.
    """
    image = decode(image)
    with _clear_errors(f"Cannot convert an image of mode {image.mode!r} to RGB"):
        if image.mode.startswith("I") or image.mode == "F":
            return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
        if image.mode in ("La", "RGBa"):  # premultiplied alpha: PIL converts these only step by step
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def decode(image: Image.Image) -> Image.Image:
    """Reads the pixels of a (possibly lazily opened) PIL image and turns it upright."""
    _check_size(image, "the given image")
    with _clear_errors("Cannot decode an image; its file is truncated or corrupt"):
        image.load()
        return ImageOps.exif_transpose(image)


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
        image = image.detach().cpu()
        image = (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).numpy()
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
    elif image.dtype == np.uint16:
        image = _to_8_bit(image, "I;16")
    elif image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError("An image contains NaN or infinite values.")
    elif image.dtype.kind not in "uif":
        raise ValueError(f"An image must hold numbers, got an array of dtype {image.dtype}.")
    return image


def prepare_array(
    image: Image.Image | np.ndarray | torch.Tensor,
    do_convert_rgb: bool | None,
    input_data_format: str | ChannelDimension | None,
    do_rescale: bool | None,
) -> np.ndarray:
    """Brings any image to a checked array [C, H, W]; what both backends start with.

    transformers converts arrays to RGB, too, but not in all versions, and not all in the same way.

    Args:
        image: An opened image.
        do_convert_rgb: Whether to expand grey, and to composite transparency onto white.
        input_data_format: Where an array's channels are; inferred if not given.
        do_rescale: Whether the values are about to be divided by 255.
    """
    if isinstance(image, Image.Image):
        image = np.array(to_rgb(image) if do_convert_rgb else decode(image))
        input_data_format = ChannelDimension.LAST
    array = check_array(image, input_data_format)
    if do_rescale:
        _warn_if_already_scaled(array)
    return _array_to_rgb(array) if do_convert_rgb else array


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


def _open(file: io.BytesIO | Path, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be decoded safely: {error}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"Cannot read {name} as an image: {error}") from error
    _check_size(image, name)
    return image


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


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Scales integers of more than 8 bits, or floats, to `uint8`; the range is what the mode or the values tell."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it contains NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its values range from {low:g} to {high:g}, expected 0 to 65535")
    if mode == "F" and high <= 1:
        scale = 255.0
    elif mode in ("I", "F") and high <= 255:  # these modes do not say how many bits are used
        scale = 1.0
    else:
        scale = 255 / 65535
    return np.rint(values * scale).astype(np.uint8)


def _infer_format(shape: tuple[int, ...]) -> ChannelDimension:
    first, last = shape[0] in _CHANNEL_COUNTS, shape[-1] in _CHANNEL_COUNTS
    if first and last and shape[0] == 1 and shape[-1] != 1:
        return ChannelDimension.LAST  # a picture one pixel high is likelier than one three pixels wide in grey
    if first:
        return ChannelDimension.FIRST
    if last:
        return ChannelDimension.LAST
    raise ValueError(f"An image must have 1, 3 or 4 channels as its first or last dimension, got shape {shape}.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or a NUL byte: then it is no path
        return False


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


_ACCEPTED = "a PIL image, a NumPy array, a tensor, a path, a URL or the bytes of an image file"


def fetch_images(images: Any) -> Any:
    """Opens every path, URL and file content in a single image or a (nested) list; keeps the nesting.

    Raises:
        ValueError: for `None`, an empty list, or anything that is no image.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("Got an empty list of images; pass at least one image.")
        return [fetch_images(image) if not _is_empty_list(image) else [] for image in images]
    if isinstance(images, (str, bytes, os.PathLike)):
        return load_image(images)
    if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
        return images
    raise ValueError(f"An image must be {_ACCEPTED}, got {type(images).__name__}.")


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


class LavitImageDefaults(RemoteCodeDictMixin):
    """What the two backends share: the release's preprocessing, and which inputs are taken."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths, URLs and file contents; images pass through. The nesting is kept."""
        return fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        flat = flatten(self.fetch_images(images))
        if not flat:
            raise ValueError("Got no images; pass at least one.")
        return flat


VISUAL_MODES = ("continuous", "discrete", "bare")


@dataclass
class TokenRow:
    """The tokens of one prompt.

    `offsets` are the characters a token stands for, in the prompt with every placeholder replaced by the names of its
    image's tokens (empty ranges for those themselves); `replacements` tell where that happened, as `ProcessorMixin`
    does.
    """

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    replacements: list[dict[str, Any]] = field(default_factory=list)
    _prompt_length: int = 0
    _expanded_length: int = 0

    def add_text(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> None:
        """Appends a text segment."""
        start = self._expanded_length
        self.ids.extend(ids)
        self.offsets.extend((start + first, start + last) for first, last in offsets)
        self._prompt_length += len(text)
        self._expanded_length += len(text)

    def add_image(self, ids: Sequence[int], placeholder: str, replacement: str) -> None:
        """Appends the tokens of an image, whose names are `replacement`."""
        start, new_start = self._prompt_length, self._expanded_length
        self.image_spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids.extend(ids)
        self.offsets.extend([(new_start, new_start)] * len(ids))
        self._prompt_length += len(placeholder)
        self._expanded_length += len(replacement)
        self.replacements.append(
            {
                "type": "image",
                "span": (start, self._prompt_length),
                "new_span": (new_start, self._expanded_length),
                "text": placeholder,
                "replacement": replacement,
            }
        )

    def add_start(self, index: int) -> None:
        """Appends the start of an image that is to be drawn; it stands for no characters."""
        self.ids.append(index)
        self.offsets.append((self._expanded_length, self._expanded_length))

    def truncate(self, max_length: int, side: str, prompt_index: int) -> None:
        """Cuts text off one side; refuses to cut images, whose features the model would look for in vain."""
        excess = len(self.ids) - max_length
        if excess <= 0:
            return
        first, last = (excess, len(self.ids)) if side == "left" else (0, max_length)
        if any(start < first or end > last for start, end in self.image_spans):
            raise ValueError(
                f"Truncating prompt {prompt_index} from {len(self.ids)} to `max_length={max_length}` tokens on the "
                f"{side} would cut an image. Raise `max_length`, or pass fewer images or shorter text."
            )
        self.ids, self.offsets = self.ids[first:last], self.offsets[first:last]
        self.image_spans = [(start - first, end - first) for start, end in self.image_spans]


def check_prompts(text: Any, allow_empty: bool = False) -> list[str]:
    """One prompt or a list of them, as a list."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`text` must be a string or a list of strings.")
    if not prompts:
        raise ValueError("`text` is an empty list; pass at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not prompt and not allow_empty:
            raise ValueError(f"Prompt {index} is empty: it holds neither text nor an image placeholder.")
    return list(prompts)


def assign_images(images: Any, counts: Sequence[int], image_token: str) -> list[Any]:
    """All images in order of appearance, after checking that every prompt has as many images as placeholders.

    Args:
        images: Opened images: one, a flat list, a list per prompt, or `None`.
        counts: Placeholders per prompt.
        image_token: The placeholder, for messages.
    """
    if images is None:
        groups: list[list[Any]] = [[]]
    elif is_nested(images):
        groups = [flatten(group) for group in images]
    else:
        groups = [flatten(images)]
    details = _find_mismatch(groups, counts, image_token, per_prompt=images is not None and is_nested(images))
    if details:
        raise ValueError(
            f"The number of {image_token} tokens in the prompts should be the same as the number of images passed: "
            f"{details}."
        )
    return flatten(groups)


def _find_mismatch(groups: list[list[Any]], counts: Sequence[int], image_token: str, per_prompt: bool) -> str:
    if per_prompt and len(groups) != len(counts):
        return f"got {len(groups)} lists of images for {len(counts)} prompts"
    if per_prompt:
        wrong = (i for i, (group, count) in enumerate(zip(groups, counts, strict=True)) if len(group) != count)
        if (index := next(wrong, None)) is not None:
            return f"prompt {index} has {counts[index]}, but got {len(groups[index])} image(s) for it"
        return ""
    num_images = sum(map(len, groups))
    if num_images == sum(counts):
        return ""
    where = ", ".join(f"{count} in prompt {index}" for index, count in enumerate(counts))
    return f"found {sum(counts)} ({where}), but got {num_images} image(s)"


def assign_modes(visual_mode: Any, num_images: int) -> list[str]:
    """The visual mode of every image, from one for all or (nested) lists of one per image."""
    if isinstance(visual_mode, str):
        modes = [visual_mode] * num_images
    else:
        modes = flatten(visual_mode)
        if len(modes) != num_images:
            raise ValueError(f"Got {len(modes)} visual modes for {num_images} image(s).")
    return [check_visual_mode(mode) for mode in modes]


def check_visual_mode(mode: Any) -> str:
    """Returns the mode of an image if it is one."""
    if mode not in VISUAL_MODES:
        raise ValueError(f"`visual_mode` must be 'continuous', 'discrete' or 'bare', got {mode!r}.")
    return mode


def check_generation_mode(mode: str | None) -> str:
    """Returns what is to be generated; text by default."""
    mode = "text" if mode is None else mode
    if mode not in GENERATION_MODES:
        raise ValueError(f"`generation_mode` must be 'text', 'image' or 'interleaved', got {mode!r}.")
    return mode


BOI_TOKEN = "<img>"


EOI_TOKEN = "</img>"


IMAGE_TOKEN = "<image>"


VISUAL_TOKEN = "<visual_{}>"


_SPACE = "\u2581"  # sentencepiece's mark of a space


_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


# Texts on which sentencepiece models of another kind than Llama's (unigram, normalizing, joining spaces) would differ.
_PROBES = (
    "Question: what is it? Answer:",
    "  two  spaces ",
    "tab\tand\nnew line\r\n",
    "\ufb01 \u2460 \uff21 e\u0301 \u00a0x",
    "<s></s><unk><0x41> \u2581 \x00",
    "The quick brown foxes jumped over 1,234 lazy dogs; then they slept.",
    "\u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f642",
)


def read_sentencepiece(model_file: str | Path) -> tuple[Tokenizer, dict[str, str]]:
    """Converts a sentencepiece BPE model (Llama's `tokenizer.model`); needs `sentencepiece`, but not protobuf.

    transformers' own conversion needs protobuf, gives a text that starts with a space other ids than sentencepiece
    does, and can merge typed text into control symbols.

    Returns:
        The tokenizer, and its special tokens by name (`bos_token`, ...).
    """
    try:  # so that transformers does not ask everyone for it who loads this file as remote code
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError("Reading a sentencepiece model needs sentencepiece: pip install sentencepiece") from error

    try:
        model = SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{model_file} is not a sentencepiece model: {error}") from error
    # A BPE piece's score is its rank, a unigram piece's a log-probability.
    is_bpe = all(model.get_score(index).is_integer() for index in range(model.get_piece_size()))
    tokenizer = _convert_sentencepiece(model)
    if not is_bpe or any(tokenizer.encode(text).ids != model.encode(text) for text in _PROBES):
        raise ValueError(
            f"{model_file} is a sentencepiece model of an unsupported kind: only BPE models without text "
            "normalization, as Llama's, can be converted."
        )
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    names["pad_token"] = model.pad_id()
    return tokenizer, {name: model.id_to_piece(index) for name, index in names.items() if index >= 0}


def extend_with_visual_tokens(
    tokenizer: Tokenizer, codebook_size: int, special_tokens: Collection[str], text_vocab_size: int | None = None
) -> Tokenizer:
    """Returns a copy of a BPE tokenizer with the visual vocabulary behind its own.

    Args:
        tokenizer: The text tokenizer's backend.
        codebook_size: Number of visual codes K.
        special_tokens: The text tokenizer's special tokens. They keep their ids, as rows of the vocabulary.
        text_vocab_size: The id V at which the visual vocabulary starts, where the language model's vocabulary is
            larger than the tokenizer's; the ids between get reserved names.
    """
    spec = json.loads(tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ValueError(
            f"Only BPE text tokenizers can be extended with visual tokens, got a {spec['model']['type']} tokenizer."
        )
    if codebook_size < 1:
        raise ValueError(f"`codebook_size` must be positive, got {codebook_size}.")
    vocab: dict[str, int] = spec["model"]["vocab"]
    specials = {token["content"] for token in spec["added_tokens"] if token["special"]} | set(special_tokens)
    _add_row_tokens(vocab, spec["added_tokens"])
    _fill_up_to(vocab, text_vocab_size)
    names = [BOI_TOKEN, EOI_TOKEN, *map(VISUAL_TOKEN.format, range(codebook_size)), IMAGE_TOKEN]
    taken = [name for name in names if name in vocab]
    if taken:
        raise ValueError(f"The text tokenizer has tokens of its own with the names {', '.join(taken[:5])}.")
    vocab.update({name: len(vocab) + position for position, name in enumerate(names)})

    # Merges into a control symbol would let a user type it; sentencepiece never makes them.
    unmergeable = specials | set(names)
    if spec["model"].get("byte_fallback"):
        unmergeable |= {token for token in vocab if _BYTE_PIECE.fullmatch(token)}
    spec["model"]["merges"] = [pair for pair in _pairs(spec["model"]["merges"]) if "".join(pair) not in unmergeable]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    spec["post_processor"] = spec["padding"] = spec["truncation"] = None  # nothing is put around a segment
    extended = Tokenizer.from_str(json.dumps(spec))
    _check_untypable(extended, vocab, [*specials & set(vocab), *names[:3], *names[-2:]])
    return extended


def _convert_sentencepiece(model: Any) -> Tokenizer:
    size = model.get_piece_size()
    vocab = {model.id_to_piece(index): index for index in range(size)}
    scores = {
        model.id_to_piece(index): model.get_score(index)
        for index in range(size)
        if not (model.is_control(index) or model.is_unknown(index) or model.is_byte(index) or model.is_unused(index))
    }
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges_from_scores(scores),
            unk_token=model.id_to_piece(model.unk_id()),
            fuse_unk=True,
            byte_fallback=sum(map(model.is_byte, range(size))) == 256,
        )
    )
    # Unlike the Metaspace pre-tokenizer, this adds the dummy space to a text that starts with a space, too.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _merges_from_scores(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, best piece first, as sentencepiece applies them."""
    merges = [
        (-score, cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(merges, key=lambda merge: merge[:2])]


def _add_row_tokens(vocab: dict[str, int], added_tokens: list[dict[str, Any]]) -> None:
    """Gives added tokens a row at their id, so that nothing moves when they stop being added tokens."""
    used = {index: token for token, index in vocab.items()}
    for token in added_tokens:
        content, index = token["content"], token["id"]
        if vocab.get(content, index) != index or used.get(index, content) != content:
            raise ValueError(f"The text tokenizer's added token {content!r} does not fit its vocabulary.")
        vocab[content] = index
        used[index] = content


def _fill_up_to(vocab: dict[str, int], text_vocab_size: int | None) -> None:
    size = max(vocab.values()) + 1
    if text_vocab_size is not None and text_vocab_size < size:
        raise ValueError(f"`text_vocab_size` is {text_vocab_size}, but the text tokenizer has ids up to {size - 1}.")
    for index in sorted(set(range(text_vocab_size or size)) - set(vocab.values())):
        vocab[f"<reserved_{index}>"] = index


def _pairs(merges: Iterable[Any]) -> Iterable[tuple[str, str]]:
    for merge in merges:  # "a b" in files of old versions
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _check_untypable(tokenizer: Tokenizer, vocab: dict[str, int], names: Iterable[str]) -> None:
    tokenizer.encode_special_tokens = True
    for name in names:
        for text in (name, f" {name}", f"a{name}a"):
            if vocab[name] in tokenizer.encode(text, add_special_tokens=False).ids:
                raise ValueError(f"The text tokenizer would turn {name!r}, typed by a user, into a control token.")


# How a tokenizer was loaded, which the base class keeps among its settings; remote code needs the last one there.
_REMOTE_CODE_KWARGS = ("auto_map",) if IS_PACKAGE else ()


_LOADING_KWARGS = ("is_local", "local_files_only", "trust_remote_code", "added_tokens_decoder", *_REMOTE_CODE_KWARGS)


_Codes = TypeVar("_Codes", int, list[int], tuple[int, ...], np.ndarray, torch.Tensor)


class LavitTokenizer(RemoteCodeMixin, TokenizersBackend):
    """Text and visual vocabulary in one.

    It never adds a BOS or EOS, and pads on the left. Text is only ever text: `"</s>"`, `"<visual_7>"` or `"<image>"`
    typed by a user become the ids of their characters (`ImageTextProcessor` puts the images in). Decoding with
    `skip_special_tokens=True` hides the visual ids too.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    boi_token = BOI_TOKEN
    eoi_token = EOI_TOKEN
    image_token = IMAGE_TOKEN

    def __init__(self, *args: Any, split_special_tokens: bool = True, **kwargs: Any) -> None:
        for name in ("add_bos_token", "add_eos_token"):
            kwargs.pop(name, None)
        if kwargs.get("pad_token") is None:
            kwargs["pad_token"] = kwargs.get("eos_token")
        super().__init__(*args, split_special_tokens=split_special_tokens, **kwargs)
        for name in _LOADING_KWARGS:  # or they would be saved as settings
            self.init_kwargs.pop(name, None)
        if self._tokenizer.token_to_id(IMAGE_TOKEN) is None:
            raise ValueError(
                "This tokenizer has no visual vocabulary; make one with `LavitTokenizer.from_text_tokenizer` or "
                "`LavitTokenizer.from_sentencepiece`."
            )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        # The base class would take the backend apart to rebuild it in `__init__`; ours reads it from its file.
        return kwargs

    @classmethod
    def from_sentencepiece(
        cls, model_file: str | Path, codebook_size: int, text_vocab_size: int | None = None, **kwargs: Any
    ) -> "LavitTokenizer":
        """Extends a sentencepiece BPE model (Llama's `tokenizer.model`); its ids stay exactly sentencepiece's."""
        backend, special_tokens = read_sentencepiece(model_file)
        extended = extend_with_visual_tokens(backend, codebook_size, special_tokens.values(), text_vocab_size)
        return cls(tokenizer_object=extended, **{**special_tokens, **kwargs})

    @classmethod
    def from_text_tokenizer(
        cls,
        text_tokenizer: PreTrainedTokenizerBase,
        codebook_size: int,
        text_vocab_size: int | None = None,
        **kwargs: Any,
    ) -> "LavitTokenizer":
        """Extends a BPE text tokenizer of transformers; the ids of its tokens, added ones included, stay.

        Args:
            text_tokenizer: A tokenizer backed by the `tokenizers` library.
            codebook_size: Number of visual codes K.
            text_vocab_size: V, if the language model has more embedding rows than the tokenizer has ids.
        """
        backend = getattr(text_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"Only tokenizers backed by the `tokenizers` library can be extended, got "
                f"{type(text_tokenizer).__name__}."
            )
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special_tokens = {name: getattr(text_tokenizer, name) for name in names if getattr(text_tokenizer, name, None)}
        kwargs.setdefault("model_max_length", text_tokenizer.model_max_length)
        extended = extend_with_visual_tokens(
            backend, codebook_size, text_tokenizer.all_special_tokens, text_vocab_size
        )
        return cls(tokenizer_object=extended, **{**special_tokens, **kwargs})

    @property
    def boi_token_id(self) -> int:
        """V: the id of the token that starts an image."""
        return self._tokenizer.token_to_id(BOI_TOKEN)

    @property
    def eoi_token_id(self) -> int:
        """V+1: the id of the token that ends an image."""
        return self._tokenizer.token_to_id(EOI_TOKEN)

    @property
    def visual_token_offset(self) -> int:
        """V+2: the id of code 0."""
        return self.boi_token_id + 2

    @property
    def image_token_id(self) -> int:
        """V+2+K: the id of the placeholder that a continuous feature replaces."""
        return self._tokenizer.token_to_id(IMAGE_TOKEN)

    @property
    def codebook_size(self) -> int:
        """K: the number of visual codes."""
        return self.image_token_id - self.visual_token_offset

    def convert_codes_to_ids(self, codes: _Codes) -> _Codes:
        """Codes (0 to K-1; an int, a list, a tuple, an array or a tensor) to token ids."""
        self._check_range(codes, 0, self.codebook_size, "code")
        return _shift(codes, self.visual_token_offset)

    def convert_ids_to_codes(self, ids: _Codes) -> _Codes:
        """Token ids of visual codes (an int, a list, a tuple, an array or a tensor) to codes."""
        self._check_range(ids, self.visual_token_offset, self.image_token_id, "visual token id")
        return _shift(ids, -self.visual_token_offset)

    def split_images(self, ids: Any) -> list[IdRun]:
        """Splits what a model wrote into runs of text and images.

        Args:
            ids: One sequence, `[length]`: a list, an array or a tensor.

        Returns:
            Runs in order, each with its `kind` (`"text"`, `"image"`, or `"features"` for continuous images of the
            prompt) and its `ids` (text ids, or codes). Ids that do not belong into an image are dropped.
        """
        rows = as_rows(ids)
        if len(rows) != 1:
            raise ValueError(f"Expected the ids of one sequence, got {len(rows)}.")
        visual = VisualIds(self.boi_token_id, self.eoi_token_id, self.visual_token_offset, self.image_token_id)
        return split_ids(rows[0], visual, set(self.all_special_ids))

    @staticmethod
    def _check_range(values: Any, low: int, high: int, name: str) -> None:
        for value in np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values).flat:
            if not low <= value < high:
                raise ValueError(f"{value} is not a {name}: expected {low} to {high - 1}.")

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...

    @overload
    def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool = False) -> list[str]: ...

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        """As everywhere; `skip_special_tokens` hides the visual ids too."""
        if isinstance(ids, (int, np.integer)):
            ids = int(ids)  # NumPy's are no integers to the base class
        elif skip_special_tokens:
            ids = self._without_visual_ids(ids)
        return super().convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        if skip_special_tokens:
            ids = [int(token_ids)] if isinstance(token_ids, (int, np.integer)) else token_ids
            token_ids = self._without_visual_ids(ids)
        return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def _without_visual_ids(self, ids: Sequence[int]) -> list[int]:
        first, last = self.boi_token_id, self.image_token_id
        return [index for index in map(int, ids) if not first <= index <= last]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = self.split_special_tokens  # the backend does not pickle this


def _shift(values: Any, by: int) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(value + by for value in values)
    return values + by


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
        array = prepare_array(image, do_convert_rgb, input_data_format, kwargs.get("do_rescale"))
        return super().process_image(array, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, **kwargs)


Source = str | os.PathLike | None


# What the encoder was trained with. Its sizes and crops are not taken over: LaVIT sees whole pictures, squashed.
_STATISTICS = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample")


def resolve_config(config: Any, vision: Source, text: Source, **kwargs: Any) -> LavitConfig:
    """The configuration that a processor has to fit: that of a model, or one made as the model's is.

    Raises:
        TypeError: If `config` is neither a configuration nor a model.
        ValueError: If there is nothing to make one of, or values are given beside a configuration.
    """
    if config is None:
        if vision is None or text is None:
            raise ValueError("Pass `config=model.config`, or both the vision model and the language model.")
        return LavitConfig.from_vision_text_configs(
            AutoConfig.from_pretrained(vision), AutoConfig.from_pretrained(text), **kwargs
        )
    config = getattr(config, "config", config)
    if not isinstance(config, LavitConfig):
        raise TypeError(f"`config` must be a LavitConfig or a model that has one, got {type(config).__name__}.")
    if kwargs:
        raise ValueError(f"Got both `config` and {', '.join(sorted(kwargs))}, which it holds already.")
    return config


def build_image_processor(source: Any, config: LavitConfig) -> LavitImageProcessorPil:
    """LaVIT's image processor with the statistics of a vision encoder's own.

    Args:
        source: The vision encoder's image processor, or its directory or Hub id.
        config: Its vision encoder gives the image size.

    Raises:
        ValueError: If there is no image processor.
    """
    if source is None:
        raise ValueError("Pass the vision model's directory or Hub id, or `image_processor`.")
    if isinstance(source, (str, os.PathLike)):
        source = AutoImageProcessor.from_pretrained(source)
    values = {name: getattr(source, name, None) for name in _STATISTICS}
    height, width = config.visual_tokenizer_config.image_size
    return LavitImageProcessorPil(
        size={"height": height, "width": width},
        **{name: value for name, value in values.items() if value is not None},
    )


def build_tokenizer(source: Any, config: LavitConfig) -> LavitTokenizer:
    """The language model's tokenizer with the visual vocabulary behind all rows of its embedding table.

    Args:
        source: The text tokenizer, or its directory or Hub id.
        config: Its ids.

    Raises:
        ValueError: If there is no tokenizer, or it has more ids than the language model.
    """
    if source is None:
        raise ValueError("Pass the language model's directory or Hub id, or `tokenizer`.")
    if isinstance(source, (str, os.PathLike)):
        source = AutoTokenizer.from_pretrained(source)
    if isinstance(source, LavitTokenizer) or not isinstance(source, PreTrainedTokenizerBase):
        raise ValueError(f"Expected a text tokenizer of transformers, got {type(source).__name__}.")
    last_id = max(source.get_vocab().values())
    if last_id >= config.boi_token_id:
        raise ValueError(
            f"The text tokenizer has ids up to {last_id}, but the language model embeds {config.boi_token_id} only. "
            "Resize its embeddings first (`resize_token_embeddings`), or use its own tokenizer."
        )
    return LavitTokenizer.from_text_tokenizer(
        source, config.visual_tokenizer_config.codebook_size, text_vocab_size=config.boi_token_id
    )


_UNSUPPORTED_TEXT_KWARGS = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "is_split_into_words",
    "stride",
    "return_length",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
)


_CHAT_ARGUMENTS = (
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
    "tokenize",
    "return_tensors",
    "return_dict",
    "load_audio_from_video",
    "processor_kwargs",
)


# Models that are neither saved nor copied with the processor.
_BY_REFERENCE = ("_visual_tokenizer", "_loaded_visual_tokenizer", "pixel_decoder")


_OWN_KWARGS = ("visual_mode", "generation_mode", "return_mm_token_type_ids", "return_text_replacement_offsets")


class ImageTextProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call, beside those of tokenizer and image processor."""

    _defaults = {}  # type: ignore[misc, var-annotated] # transformers 5.20 asks for it

    visual_mode: str | list | None
    generation_mode: str | None


class _ModalityKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of tokenizer and image processor alone: transformers 5.20 knows no others."""

    _defaults = {}  # type: ignore[misc, var-annotated]


class RemoteCodeProcessorMixin(RemoteCodeMixin, ProcessorMixin):
    """A processor that saves its code; transformers' tests compare a processor with the class right above it."""


class ImageTextProcessor(RemoteCodeProcessorMixin):
    """Joins image processor and tokenizer; `<image>` in a prompt is where an image goes, all else is text.

    Args:
        image_processor: A `LavitImageProcessor` or `LavitImageProcessorPil`.
        tokenizer: A `LavitTokenizer`.
        chat_template: A Jinja template; by default questions and answers as the release words them.
        image_seq_length: Patches per image: how many placeholders an image gets in the light form.
        visual_mode: `"continuous"` (features, for understanding), `"discrete"` (codes between image start and end) or
            `"bare"` (codes alone); calls may override it.
        visual_tokenizer: A `LavitVisualTokenizer` or a model that has one, held by reference and never saved; makes
            the attached form. Discrete images work without one: it is then loaded from the processor's own checkpoint
            on first need.
        pixel_decoder: What `post_process_multimodal_output` turns codes into images with, held by reference and never
            saved: a `LavitPixelDecoderPipeline`, or anything to be called with `codes=[...]` that returns an object
            with `images`.
    """

    valid_processor_kwargs = ImageTextProcessorKwargs
    generation_mode = "text"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_seq_length: int = 256,
        visual_mode: str = "continuous",
        visual_tokenizer: Any = None,
        pixel_decoder: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # By its name: remote code has a class of its own.
        if LavitTokenizer.__name__ not in {base.__name__ for base in type(tokenizer).__mro__}:
            raise TypeError(f"{type(self).__name__} needs a LavitTokenizer, got {type(tokenizer).__name__}.")
        self.image_seq_length = image_seq_length
        self.visual_mode = check_visual_mode(visual_mode)
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self._checkpoint: Checkpoint | None = None
        self._loaded_visual_tokenizer: Any = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE, **kwargs)
        self.visual_tokenizer = visual_tokenizer
        self.pixel_decoder = pixel_decoder

    @property
    def visual_tokenizer(self) -> Any:
        """The attached visual tokenizer, or `None`; a whole model may be assigned as well."""
        return self._visual_tokenizer

    @visual_tokenizer.setter
    def visual_tokenizer(self, value: Any) -> None:
        self._visual_tokenizer = check_visual_tokenizer(value, self.tokenizer.codebook_size, self.image_seq_length)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares prompts with images for the model.

        Args:
            images: One image, a flat list in order of appearance, or one list per prompt: PIL images, arrays, tensors,
                paths or URLs.
            text: One prompt or several, with `<image>` where an image goes. Each stretch of text between images is
                tokenized as if it stood alone.
            kwargs: Those of tokenizer and image processor, and

                - `generation_mode`: What the model is to generate: `"text"` (default), `"image"` (ends each prompt
                  with the image start; a prompt may then be empty, to draw without one) or `"interleaved"`.
                - `visual_mode`: `"continuous"`, `"discrete"` or `"bare"` for all images, or a (nested) list of one per
                  image. By default the processor's own; with `generation_mode="image"` it is `"bare"`, which is what
                  the release draws from.

        Returns:
            `input_ids` and `attention_mask`, and, if there are continuous images, `pixel_values` [images, 3, H, W]
            (light) or `image_features` [total kept, hidden] (attached). Without text, just the `pixel_values`.
        """
        if any(kwargs.pop(name, None) is not None for name in ("videos", "audio")):
            raise ValueError(f"{type(self).__name__} takes images and text, no videos and no audio.")
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both.")
        own, merged = self._merge_call_kwargs(kwargs)
        is_drawing = check_generation_mode(own["generation_mode"]) == "image"
        if text is None and is_drawing:
            raise ValueError('With `generation_mode="image"`, pass `text`, too (it may be empty).')
        if text is None:
            return self.image_processor(images, **merged["images_kwargs"])

        # 1. Find out which image stands where.
        prompts = check_prompts(text, allow_empty=is_drawing)
        segments = [prompt.split(self.image_token) for prompt in prompts]
        images = None if images is None or not flatten(images) else fetch_images(images)
        flat_images = assign_images(images, [len(parts) - 1 for parts in segments], self.image_token)
        default_mode = "bare" if is_drawing else self.visual_mode
        modes = assign_modes(own["visual_mode"] or default_mode, len(flat_images))

        # 2. Turn every image into ids, and the continuous ones into what the model replaces their placeholders by.
        image_ids, image_inputs = self._encode_images(flat_images, modes, merged["images_kwargs"])

        # 3. Tokenize the text segments, and put the images between them.
        rows = self._build_rows(segments, image_ids)

        # 4. Cut, start the image to draw, and pad.
        text_inputs = self._finish_rows(rows, own, merged["text_kwargs"], is_drawing)
        return_tensors = merged["text_kwargs"].get("return_tensors")
        data = {**text_inputs, **_convert_image_inputs(image_inputs, return_tensors)}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def tokenize_images(self, images: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The ids of images as the language model reads and writes them: `[start]`, codes, `[end]`.

        Args:
            images: One image or a (nested) list.
            kwargs: For the image processor.

        Returns:
            One integer tensor [codes + 2] per image, in order.
        """
        pixel_values = self.image_processor(images, **{**kwargs, "return_tensors": "pt"})["pixel_values"]
        return [torch.tensor(self._between_start_and_end(ids)) for ids in self._discrete_ids(pixel_values)]

    def get_num_image_tokens(self, input_ids: Any) -> list[list[int]]:
        """Tokens between start and end of every image, per row: the number of patches kept, in the attached and the
        discrete form. Bare images do not count.
        """
        counts: list[list[int]] = []
        for row in input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids:
            starts = [i for i, index in enumerate(row) if index == self.tokenizer.boi_token_id]
            ends = [i for i, index in enumerate(row) if index == self.tokenizer.eoi_token_id]
            counts.append([end - start - 1 for start, end in zip(starts, ends, strict=False)])
        return counts

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As everywhere. With `tokenize=True` all text of the conversation stays text, `<image>` included (with
        `sanitize_control_tokens=True` that of template variables, too); a prompt that is rendered first and passed to
        the processor afterwards cannot make that difference. `generation_mode` reaches the template, too.
        """
        self._share_generation_mode(chat_template, kwargs)
        is_strict = kwargs.pop("sanitize_control_tokens", False)  # done here, not in transformers: more strictly
        if is_strict and not kwargs.get("tokenize"):
            raise ValueError("`sanitize_control_tokens=True` requires `tokenize=True`.")
        hidden = None
        if kwargs.get("tokenize"):
            names = ["tools", "documents"]
            if is_strict:
                names = [name for name in kwargs if name not in _CHAT_ARGUMENTS]
            hidden, (conversation, *values) = hide_brackets(conversation, *(kwargs.get(name) for name in names))
            kwargs.update(zip(names, values, strict=True))
        token = hidden_bracket.set(hidden)
        try:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        finally:
            hidden_bracket.reset(token)

    def _share_generation_mode(self, chat_template: str | None, kwargs: dict[str, Any]) -> None:
        """Hands `generation_mode` to the template if that asks for it, and to the call of the processor."""
        processor_kwargs = kwargs.get("processor_kwargs") or {}
        mode = kwargs.pop("generation_mode", None) or processor_kwargs.get("generation_mode")
        if mode is None:
            return
        check_generation_mode(mode)
        if kwargs.get("tokenize"):
            kwargs["processor_kwargs"] = {**processor_kwargs, "generation_mode": mode}
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        if "generation_mode" in named.get(chat_template or "default", chat_template or self.chat_template):
            kwargs["generation_mode"] = mode

    def post_process_multimodal_output(  # type: ignore[override]
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        pixel_decoder: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Turns generated ids into text, images, or both.

        Args:
            generated_outputs: What `generate` returned, prompts included: [batch, sequence] or [sequence]. New ids
                alone are understood, too, as long as they hold nothing but codes and image end.
            skip_special_tokens: Whether to leave control tokens out of text.
            generation_mode: As for `generate`. Of `"image"`, the last image of each sequence counts (the one that the
                prompt started); `"interleaved"` returns those of the prompt as well.
            pixel_decoder: Turns codes into images; by default the processor's own, if it has one.
            kwargs: For the tokenizer's `decode`.

        Returns:
            - `"text"`: texts.
            - `"image"`: images, or without a pixel decoder codes, a tensor [codes] per sequence.
            - `"interleaved"`: per sequence a list of texts and images (or codes), in order. Texts that are empty are
              left out, and so are images that entered as continuous features: they have no codes.
        """
        mode = check_generation_mode(generation_mode)
        if mode == "text":
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        pixel_decoder = self.pixel_decoder if pixel_decoder is None else pixel_decoder
        rows = [self.tokenizer.split_images(row) for row in as_rows(generated_outputs)]
        if mode == "image":
            return draw_images([last_image(runs) for runs in rows], pixel_decoder)

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

        return join_runs(rows, decode, pixel_decoder)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What an image's placeholder stands for in the light form, in token names."""
        return self.tokenizer.boi_token + self.image_token * self.image_seq_length + self.tokenizer.eoi_token

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders per image in the light form, whatever its size (vLLM asks for this)."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    # Steps of a call

    def _merge_call_kwargs(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The processor's own arguments, and the others by modality."""
        text_kwargs = dict(kwargs.pop("text_kwargs", None) or {})
        own: dict[str, Any] = {}
        for name in _OWN_KWARGS:  # some versions of transformers put them among those of the tokenizer
            values = (kwargs.pop(name, None), text_kwargs.pop(name, None))
            own[name] = next((value for value in values if value is not None), None)
            if own[name] is None and name != "visual_mode":
                own[name] = getattr(self, name, None)
        if text_kwargs:
            kwargs["text_kwargs"] = text_kwargs
        return own, self._merge_kwargs(_ModalityKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)

    def _encode_images(
        self, images: list[Any], modes: Sequence[str], images_kwargs: dict[str, Any]
    ) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """The ids of every image, and the model inputs of the continuous ones."""
        if not images:
            return [], {}
        pixel_values = self.image_processor(images, **{**images_kwargs, "return_tensors": "pt"})["pixel_values"]
        continuous = [index for index, mode in enumerate(modes) if mode == "continuous"]
        discrete = [index for index, mode in enumerate(modes) if mode != "continuous"]
        ids: list[list[int]] = [[] for _ in images]
        inputs: dict[str, torch.Tensor] = {}
        if discrete:
            for index, codes in zip(discrete, self._discrete_ids(pixel_values[discrete]), strict=True):
                ids[index] = codes if modes[index] == "bare" else self._between_start_and_end(codes)
        if continuous:
            counts, inputs = self._continuous_inputs(pixel_values[continuous])
            for index, count in zip(continuous, counts, strict=True):
                ids[index] = self._between_start_and_end([self.image_token_id] * count)
        return ids, inputs

    def _continuous_inputs(self, pixel_values: torch.Tensor) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Placeholders per image, and what the model needs to fill them."""
        if self.visual_tokenizer is None:
            return [self.image_seq_length] * len(pixel_values), {"pixel_values": pixel_values}
        with torch.no_grad():
            output = self.visual_tokenizer.embed(_move_to(pixel_values, self.visual_tokenizer))
        return output.num_tokens.tolist(), {"image_features": output.features}

    def _discrete_ids(self, pixel_values: torch.Tensor) -> list[list[int]]:
        """The ids of every image's codes."""
        visual_tokenizer = self._visual_tokenizer_for_codes()
        with torch.no_grad():
            output = visual_tokenizer.encode(_move_to(pixel_values, visual_tokenizer))
        ids = self.tokenizer.convert_codes_to_ids(output.codes)
        return [part.tolist() for part in ids.split(output.num_tokens.tolist())]

    def _between_start_and_end(self, ids: list[int]) -> list[int]:
        return [self.tokenizer.boi_token_id, *ids, self.tokenizer.eoi_token_id]

    def _build_rows(self, segments: list[list[str]], image_ids: list[list[int]]) -> list[TokenRow]:
        texts = [show_brackets(part, hidden_bracket.get()) for parts in segments for part in parts]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        text_tokens = iter(zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True))
        images = iter(image_ids)
        rows = []
        for parts in segments:
            row = TokenRow()
            for position in range(len(parts)):
                if position > 0:
                    ids = next(images)
                    row.add_image(ids, self.image_token, self.tokenizer.decode(ids))
                row.add_text(*next(text_tokens))
            rows.append(row)
        return rows

    def _finish_rows(
        self, rows: list[TokenRow], own: dict[str, Any], options: dict[str, Any], is_drawing: bool
    ) -> dict[str, Any]:
        """Truncates and pads token rows as a tokenizer would; when drawing, ends them with the image start."""
        for name in _UNSUPPORTED_TEXT_KWARGS:
            if options.get(name):
                raise ValueError(f"{type(self).__name__} does not support `{name}`.")
        if options.get("truncation") not in (None, False, "do_not_truncate"):
            max_length = options.get("max_length") or self.tokenizer.model_max_length
            for index, row in enumerate(rows):
                row.truncate(max(max_length - is_drawing, 0), self.tokenizer.truncation_side, index)
        if is_drawing:
            for row in rows:
                row.add_start(self.tokenizer.boi_token_id)
        side = options.get("padding_side") or self.tokenizer.padding_side
        padded = self.tokenizer.pad(
            {"input_ids": [row.ids for row in rows]},
            padding=options.get("padding") or False,
            max_length=options.get("max_length"),
            pad_to_multiple_of=options.get("pad_to_multiple_of"),
            padding_side=side,
            return_attention_mask=options.get("return_attention_mask"),
            verbose=False,
        )
        inputs = dict(padded)
        if own["return_mm_token_type_ids"]:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
        if own["return_text_replacement_offsets"]:
            inputs["text_replacement_offsets"] = [row.replacements for row in rows]
        if options.get("return_offsets_mapping"):
            inputs["offset_mapping"] = [
                _pad_offsets(row.offsets, len(ids), side) for row, ids in zip(rows, inputs["input_ids"], strict=True)
            ]
        return inputs

    # The visual tokenizer: held by reference, never part of what is saved

    def _visual_tokenizer_for_codes(self) -> Any:
        """The attached visual tokenizer, or the one of the processor's checkpoint."""
        if self.visual_tokenizer is not None:
            return self.visual_tokenizer
        if self._loaded_visual_tokenizer is None:
            loaded = load_visual_tokenizer(self._checkpoint)
            self._loaded_visual_tokenizer = check_visual_tokenizer(
                loaded, self.tokenizer.codebook_size, self.image_seq_length
            )
        return self._loaded_visual_tokenizer

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "ImageTextProcessor":
        """Loads a processor.

        Args:
            pretrained_model_name_or_path: A directory or a repository of the Hub.
            kwargs: `visual_tokenizer`, `pixel_decoder`, `visual_mode` and `image_seq_length` as for the class, and
                those of `ProcessorMixin.from_pretrained`.
        """
        if IS_PACKAGE:
            kwargs.pop("trust_remote_code", None)  # no remote code where the package is: the tokenizer's would run
        # Everything left in `kwargs` reaches the tokenizer, which would keep it and save it with its own settings.
        names = ("image_seq_length", "visual_mode", "visual_tokenizer", "pixel_decoder")
        own = {name: kwargs.pop(name) for name in names if name in kwargs}
        # What locates the checkpoint: the visual tokenizer is loaded from the same place.
        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
        check_visual_mode(own.get("visual_mode", "continuous"))
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor._checkpoint = (pretrained_model_name_or_path, hub_kwargs)
        for name in names:  # in this order: the visual tokenizer is checked against the length
            if name in own:
                setattr(processor, name, own[name])
        return processor

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | os.PathLike | None = None,
        text_model_name_or_path: str | os.PathLike | None = None,
        *,
        config: Any = None,
        image_processor: Any = None,
        tokenizer: Any = None,
        codebook_size: int | None = None,
        **kwargs: Any,
    ) -> "ImageTextProcessor":
        """The processor of a model that [`LavitForConditionalGeneration.from_vision_text_pretrained`] has built.

        Args:
            vision_model_name_or_path: Where the vision encoder's image processor is: its directory or Hub id, or that
                of a visual tokenizer.
            text_model_name_or_path: Where the language model's tokenizer is.
            config: The new model, or its configuration. Without it one is made of the two models' own.
            image_processor: An image processor to use instead.
            tokenizer: A text tokenizer to use instead.
            codebook_size: Number of visual codes, where `config` does not tell.
            kwargs: Those of the class, such as `visual_tokenizer` and `visual_mode`.

        Raises:
            TypeError: If `config` is neither a model nor its configuration.
            ValueError: If something is missing, or the tokenizer does not fit the language model.
        """
        codes = {} if codebook_size is None else {"codebook_size": codebook_size}
        config = resolve_config(config, vision_model_name_or_path, text_model_name_or_path, **codes)
        return cls(
            build_image_processor(image_processor or vision_model_name_or_path, config),
            build_tokenizer(tokenizer or text_model_name_or_path, config),
            image_seq_length=config.visual_tokenizer_config.num_patches,
            **kwargs,
        )

    @classmethod
    def get_attributes(cls) -> list[str]:
        # `ProcessorMixin` takes any argument whose name contains "tokenizer" for a text tokenizer.
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        images = "pixel_values" if self.visual_tokenizer is None else "image_features"
        return ["input_ids", "attention_mask", images]

    def to_dict(self) -> dict[str, Any]:
        light = copy.copy(self)  # the base class deep-copies all there is before it picks what to save
        for name in _BY_REFERENCE:
            del light.__dict__[name]
        return super(ImageTextProcessor, light).to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageTextProcessor":
        for shared in (self.__dict__[name] for name in _BY_REFERENCE):
            if shared is not None:
                memo[id(shared)] = shared
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded_visual_tokenizer": None}  # loaded again on need


def _move_to(pixel_values: torch.Tensor, visual_tokenizer: Any) -> torch.Tensor:
    # An offloaded model is on the meta device between calls, and moves its inputs by itself.
    device = None if visual_tokenizer.device.type == "meta" else visual_tokenizer.device
    return pixel_values.to(device=device, dtype=visual_tokenizer.dtype)


def _convert_image_inputs(inputs: dict[str, torch.Tensor], return_tensors: Any) -> dict[str, Any]:
    """Tensors as they are for PyTorch, arrays otherwise, as other processors return them."""
    if str(getattr(return_tensors, "value", return_tensors)) == "pt":
        return dict(inputs)
    # NumPy has no bfloat16
    return {name: value.float().cpu().numpy() for name, value in inputs.items()}


def _pad_offsets(offsets: list[tuple[int, int]], length: int, side: str) -> list[tuple[int, int]]:
    padding = [(0, 0)] * (length - len(offsets))
    return padding + offsets if side == "left" else offsets + padding


class LavitImageProcessor(LavitImageDefaults, TorchvisionBackend):
    """Converts to RGB, squashes (no crop) to a fixed size, scales to [0, 1] and normalizes with CLIP's statistics.

    Takes PIL images, NumPy arrays, tensors, paths, URLs and file contents, alone or in (nested) lists. It needs
    torchvision, whose antialiased resizing differs from PIL's in the last bit; the published model used PIL's, so
    `LavitImageProcessorPil` is the exact one.
    """

    def __init__(self, **kwargs: Unpack[ImagesKwargs]) -> None:
        requires_backends(self, ["torch", "torchvision"])
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: "torch.device | None" = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns one image as a checked tensor [C, H, W]."""
        if device is None and isinstance(image, torch.Tensor):
            device = image.device
        array = prepare_array(image, do_convert_rgb, input_data_format, kwargs.get("do_rescale"))
        tensor = torch.from_numpy(array.copy())
        return super().process_image(
            tensor, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, device=device, **kwargs
        )
