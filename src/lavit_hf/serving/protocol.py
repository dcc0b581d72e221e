"""OpenAI's forms of requests, answers and errors, as far as they mean something here.

What would change an answer and cannot be had is refused; what only keeps books for OpenAI (`user`, `metadata`, ...) is
taken and means nothing. Options that OpenAI does not have are sent by its client with `extra_body`.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .jobs import ImageResult, Usage

_COLDEST = 0.01
_MOST_SEPARATORS = 100_000  # of JSON: each can become an object of Python, and an error that takes a kilobyte
_Word = Annotated[str, Field(min_length=1)]
_Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Scale = Annotated[float, Field(ge=0, le=100)]
_FORM = re.compile(r"(constrained-)?str$|int$|list\[")  # pydantic puts it between names if there are several forms
_OF_TEXT = frozenset({"length_penalty", "min_tokens", "num_beams", "stop"})
_OF_PICTURES = frozenset(
    {
        "decoder_guidance_scale",
        "guidance_scale",
        "image_end_bias",
        "max_drawn_tokens",
        "min_drawn_tokens",
        "negative_prompt",
        "num_inference_steps",
        "output_format",
        "size",
    }
)
_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


class ApiError(Exception):
    """An error as clients of OpenAI know it.

    Args:
        status: Of HTTP.
        message: What was wrong, and what to do.
        kind: OpenAI's type of it.
        code: A name for programs.
        param: The option that was wrong.
        retry_after: Seconds after which it may work.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Form):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Form):
    """Where a picture is."""

    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] = "auto"  # the visual tokenizer decides, or a budget


class ImagePart(_Form):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class DrawnPart(ImagePart):
    """A picture that an answer holds; those of streams are numbered."""

    model_config = ConfigDict(extra="ignore")


class Message(BaseModel):
    """A message; what answers hold beside role, content and pictures may come back, and is not read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], FailFast()]
    images: Annotated[list[DrawnPart], FailFast()] = []

    @model_validator(mode="before")
    @classmethod
    def _take_drawn(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("role") != "assistant":
            return {name: value for name, value in values.items() if name != "images"}
        if values.get("images") and values.get("content") in (None, ""):  # the latter in streams
            return {**values, "content": []}
        return values

    @field_validator("content", mode="before")
    @classmethod
    def _to_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its content, and behind it what it drew."""
        return [*self.content, *self.images]


class StreamOptions(_Form):
    """What a stream says beside its content."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _check_temperature(value: float) -> float:
    if 0 < value < _COLDEST:  # what is divided by less overflows
        raise ValueError(f"must be 0, which is greedy, or from {_COLDEST} on")
    return value


class _Drawing(_Form):
    """How pictures are drawn; see [`LavitTextToImagePipeline`]."""

    size: Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")] = "auto"
    seed: _Seed | None = None
    n: Annotated[int, Field(ge=1)] = 1
    guidance_scale: _Scale | None = None
    decoder_guidance_scale: _Scale | None = None
    negative_prompt: Annotated[str, Field(max_length=4000)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_check_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_drawn_tokens: Annotated[int, Field(ge=0)] | None = None
    max_drawn_tokens: Annotated[int, Field(ge=1)] | None = None
    image_end_bias: Annotated[float, Field(ge=-100, le=100)] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = False
    user: str | None = None

    @property
    def height_and_width(self) -> tuple[int, int] | tuple[None, None]:
        """The picture's, in pixels; of `auto` the pixel decoder's own."""
        if self.size == "auto":
            return None, None
        width, height = map(int, self.size.split("x"))
        return height, width


class ChatRequest(_Drawing):
    """`/v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    modalities: list[Literal["text", "image"]] = ["text"]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: _Word | list[_Word] | None = None
    stream_options: StreamOptions | None = None
    num_beams: Annotated[int, Field(ge=1, le=16)] = 1
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    num_image_tokens: int | list[int] | None = None
    keep_rate: float | None = None
    max_total_image_tokens: int | None = None
    visual_mode: Literal["continuous", "discrete"] | None = None
    # Only as they are by default.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logprobs: Literal[False] = False
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] = False
    # For the books of a caller: taken, and not looked at.
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    @property
    def is_drawing(self) -> bool:
        """Whether the answer is pictures."""
        return set(self.modalities) == {"image"}

    @property
    def stop_words(self) -> list[str]:
        """Words that the text ends before."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def check_options(self) -> None:
        """Refuses options that mean nothing for this answer.

        `max_tokens` and `max_completion_tokens` are taken where pictures are drawn, too, and mean nothing there:
        clients send them with every request. `max_drawn_tokens` limits what is drawn.

        Raises:
            ApiError: One was given, be it as it is by default.
        """
        others = _OF_TEXT if self.is_drawing else _OF_PICTURES
        kind, modality = ("text", "text") if self.is_drawing else ("pictures", "image")
        for name in sorted(self.model_fields_set & others):
            message = f'{name} is an option of {kind}, with modalities: ["{modality}"], and means nothing here.'
            raise ApiError(400, message, code="unsupported_parameter", param=name)
        if self.length_penalty is not None and self.num_beams == 1:
            message = "length_penalty is an option of a search, with num_beams of 2 or more."
            raise ApiError(400, message, code="unsupported_parameter", param="length_penalty")


class ImageRequest(_Drawing):
    """`/v1/images/generations`."""

    prompt: Annotated[str, Field(max_length=32000)]
    model: str | None = None
    response_format: Literal["b64_json"] = "b64_json"
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    background: Literal["auto", "opaque"] = "auto"
    # There is one way to draw.
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None

    is_drawing: ClassVar = True


def parse(form: type[BaseModel], body: bytes) -> Any:
    """Reads a request.

    Raises:
        ApiError: It is no JSON, not of this form, or of more parts than any request has.
    """
    if sum(map(body.count, (b",", b"{", b"["))) > _MOST_SEPARATORS:  # before they take a thousand times its memory
        raise ApiError(413, f"The request has more than {_MOST_SEPARATORS:,} parts.", code="request_too_large")
    try:
        values = json.loads(body, parse_constant=_refuse_constant, object_hook=_drop_nulls)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request is not JSON: {str(error)[:200] or 'nested too deep'}.") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"The request must be an object of JSON, not {type(values).__name__}.")
    try:
        return form.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        first = max(found, key=lambda one: len(one["loc"]))  # of several forms, that which fits best
        param = ".".join(str(step) for step in first["loc"] if not _FORM.match(str(step)))
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"Unknown option: {param!r}.", code="unknown_parameter", param=param) from None
        raise ApiError(400, f"{param}: {first['msg']}.", code="invalid_value", param=param) from None


def _drop_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's clients send null for what is not given, in parts of messages, too."""
    return {name: value for name, value in values.items() if value is not None}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def to_base64(image: Image.Image, output_format: str) -> str:
    """A picture as a file, in base64."""
    file = io.BytesIO()
    image.save(file, format=_FORMATS[output_format])
    return base64.b64encode(file.getvalue()).decode()


def chat_usage(usages: list[Usage]) -> dict[str, Any]:
    """Tokens of all answers to one prompt."""
    prompt, new = usages[0].prompt_tokens, sum(usage.new_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"image_tokens": usages[0].image_tokens},
    }


def image_usage(usages: list[Usage]) -> dict[str, Any]:
    """Tokens of all pictures of one prompt."""
    prompt, images, new = usages[0].prompt_tokens, usages[0].image_tokens, sum(usage.new_tokens for usage in usages)
    details = {"image_tokens": images, "text_tokens": prompt - images}
    return {
        "input_tokens": prompt,
        "output_tokens": new,
        "total_tokens": prompt + new,
        "input_tokens_details": details,
    }


class ChatAnswer:
    """Answers of `/v1/chat/completions`, whole or in pieces.

    Args:
        model: The name that the model is served by.
    """

    def __init__(self, model: str):
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """All of it."""
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def piece(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of one choice."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The piece that says how many tokens there were."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def chat_choice(index: int, content: str | None, finish_reason: str, **more: Any) -> dict[str, Any]:
    """An answer to a chat."""
    message = {"role": "assistant", "content": content, "refusal": None, **more}
    return {"index": index, "message": message, "finish_reason": finish_reason, "logprobs": None}


def chat_image(base64_text: str, output_format: str) -> dict[str, Any]:
    """A picture in a message, in the form in which it can be sent back."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{output_format};base64,{base64_text}"}}


def image_entry(result: ImageResult, base64_text: str) -> dict[str, Any]:
    """A picture of `/v1/images/generations`, with what it takes to draw it again."""
    return {"b64_json": base64_text, "seed": result.seed, "flagged": result.is_flagged}


def server_sent(data: dict[str, Any] | str, event: str | None = None) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"


__all__ = [
    "ApiError",
    "ChatAnswer",
    "ChatRequest",
    "ImageRequest",
    "chat_choice",
    "chat_image",
    "chat_usage",
    "image_entry",
    "image_usage",
    "parse",
    "server_sent",
    "to_base64",
]
