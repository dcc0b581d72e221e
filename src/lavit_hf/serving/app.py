"""The application: OpenAI's endpoints over an engine, for uvicorn or any other server of ASGI applications."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .backend import TransformersBackend
from .engine import Engine, EngineClosed, QueueFull, WorkerDied
from .jobs import (
    ImageJob,
    ImageResult,
    JobCancelled,
    JobTimeout,
    PartialImage,
    PixelOptions,
    Prompt,
    TextJob,
    TextOptions,
    TextResult,
)
from .pictures import PictureReader
from .protocol import (
    ApiError,
    ChatAnswer,
    ChatRequest,
    ImageRequest,
    chat_choice,
    chat_image,
    chat_usage,
    image_entry,
    image_usage,
    parse,
    server_sent,
    to_base64,
)

_OPEN_PATHS = ("/health",)  # which need no key
_PREPARING_THREADS = 4  # that decode pictures at a time
_KEEP_ALIVE_SECONDS = 5.0
_SENDING_SECONDS = 10.0  # that a client has to take the last of its answer, when the time of its request is over
_CLOSED_REQUEST = 499  # nobody reads the answer


@dataclass(frozen=True)
class ServingLimits:
    """What a request may ask for.

    Attributes:
        max_queue: Most requests, and most answers in work, at a time.
        max_seconds: Longest time for a request.
        max_request_bytes: Of a request.
        max_image_bytes: Of a picture in it, as a file.
        max_image_pixels: Of a picture in it.
        max_images: Pictures in a request.
        max_new_tokens: Of a text.
        max_answers: Texts or pictures that a request may ask for (`n`).
        max_drawn_pixels: Of a picture to draw.
        max_steps: Denoising steps.
    """

    max_queue: int = 256
    max_seconds: float = 300.0
    max_request_bytes: int = 32 * 2**20
    max_image_bytes: int = 16 * 2**20
    max_image_pixels: int = 2**24
    max_images: int = 8
    max_new_tokens: int = 1024
    max_answers: int = 4
    max_drawn_pixels: int = 2**21
    max_steps: int = 100


class Gate:
    """Lets requests in: with the right key, as long as there is room; and counts them.

    Args:
        app: What answers them.
        engine: Whose metrics count.
        limits: How many there may be.
        api_key: What clients send as `Authorization: Bearer`; `None` lets everybody in.
    """

    def __init__(self, app: Any, engine: Engine, limits: ServingLimits, api_key: str | None):
        self._app = app
        self._engine = engine
        self._limits = limits
        self._api_key = None if api_key is None else api_key.strip().encode()
        self._in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, or has it answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        error = self._refuse(scope, headers)
        if error is not None:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            self._engine.metrics.requests.labels(self._name(scope["path"]), str(error.status)).inc()
            return
        started, status, is_over = time.monotonic(), _CLOSED_REQUEST, False

        def end() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self._count(-1)
                name = self._name(scope["path"])
                self._engine.metrics.requests.labels(name, str(status)).inc()
                self._engine.metrics.seconds.labels(name).observe(time.monotonic() - started)

        async def send_and_look(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                end()  # now, as whoever has the whole answer may ask again before the application has tidied up
            await send(message)

        self._count(1)
        try:
            # What takes time ends by itself; this ends answers that nobody takes.
            with anyio.move_on_after(self._limits.max_seconds + _SENDING_SECONDS):
                await self._app(scope, receive, send_and_look)
        finally:
            end()

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._engine.metrics.in_flight.set(self._in_flight)

    def _refuse(self, scope: Any, headers: dict[bytes, bytes]) -> ApiError | None:
        if scope["path"] in _OPEN_PATHS:
            return None
        if self._api_key is None and _is_misled(scope.get("server"), headers.get(b"host", b"")):
            return ApiError(
                403, "Without an API key this server answers localhost alone: set LAVIT_API_KEY to give it a name."
            )
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        is_known = scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._api_key or b"")
        if self._api_key is not None and not is_known:
            return ApiError(401, "The API key is missing or wrong.", "authentication_error", "invalid_api_key")
        if scope["method"] != "POST":
            return None
        # A page in a browser can send other types to any address, this machine's included, without being asked.
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            return ApiError(415, "Send JSON, with Content-Type: application/json.")
        if self._in_flight >= self._limits.max_queue:
            return _too_many(self._engine.writer.wait_seconds)
        return None

    @staticmethod
    def _name(path: str) -> str:
        known = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/images/generations")
        return path if path in known else "other"  # or anybody could make any number of metrics


def _is_misled(server: tuple[str, int] | None, host: bytes) -> bool:
    """Whether a request to this machine was meant for a name that is not its own.

    A page in a browser may read the answers of its own host. If that host's name suddenly leads to this machine (DNS
    rebinding), the page could use the server as its own.
    """
    own = server and _to_address(server[0])
    if not own or not own.is_loopback:
        return False
    try:
        name = urlsplit(f"//{host.decode('latin-1')}").hostname or "localhost"
    except ValueError:
        return True
    return name != "localhost" and _to_address(name) is None


def _to_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:  # it is the name of a host
        return None


def _too_many(seconds: int) -> ApiError:
    message = f"Too many requests at a time; try again in {seconds} s."
    return ApiError(429, message, "rate_limit_error", "rate_limit_exceeded", retry_after=seconds)


def _as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return _too_many(error.retry_after)
    if isinstance(error, EngineClosed):
        return ApiError(503, "The server is shutting down.", "server_error", "shutting_down", retry_after=10)
    if isinstance(error, (JobTimeout, TimeoutError)):
        return ApiError(504, "The request took longer than the server allows.", "timeout_error", "timeout")
    if isinstance(error, (ClientDisconnect, JobCancelled)):
        return ApiError(_CLOSED_REQUEST, "The client has closed the request.", code="cancelled")
    if isinstance(error, WorkerDied):
        return ApiError(500, str(error), "server_error", "worker_failed")
    return ApiError(500, "The server failed.", "server_error")


class Api:
    """What the endpoints do.

    Args:
        engine: What works on jobs.
        backend: What prompts are prepared with.
        name: The model's, for clients.
        limits: What a request may ask for.
        reader: Reads pictures.
    """

    def __init__(
        self, engine: Engine, backend: TransformersBackend, name: str, limits: ServingLimits, reader: PictureReader
    ):
        self._engine = engine
        self._backend = backend
        self._name = name
        self._limits = limits
        self._reader = reader
        self._preparing: anyio.CapacityLimiter | None = None
        self._created = int(time.time())

    # Endpoints

    async def health(self, request: Request) -> Response:
        """Whether the server works."""
        is_healthy = self._engine.is_healthy
        return JSONResponse({"status": "ok" if is_healthy else "failing"}, 200 if is_healthy else 503)

    async def metrics(self, request: Request) -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(self._engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        """Text, or pictures, after a chat."""
        deadline = time.monotonic() + self._limits.max_seconds
        form: ChatRequest = await self._read(request, ChatRequest)
        self._check_model(form.model)
        if set(form.modalities) not in ({"text"}, {"image"}):
            raise ApiError(400, 'An answer is text or pictures: ["text"] or ["image"].', param="modalities")
        form.check_options()
        if form.is_drawing:
            return await self._chat_in_pictures(request, form, deadline)
        prompt = await self._prepare_chat(form, deadline)
        pieces: asyncio.Queue = asyncio.Queue()
        jobs = self._make_text_jobs(form, prompt, deadline, pieces if form.stream else None)
        self._submit(jobs)
        answer = ChatAnswer(self._name)
        if form.stream:
            return _stream(self._stream_text(form, answer, jobs, pieces), jobs)
        results: list[TextResult] = await _wait(request, jobs, deadline)
        choices = [chat_choice(index, one.text, one.finish_reason) for index, one in enumerate(results)]
        return JSONResponse(answer.whole(choices, chat_usage([one.usage for one in results])))

    async def images(self, request: Request) -> Response:
        """Pictures of a prompt."""
        deadline = time.monotonic() + self._limits.max_seconds
        form: ImageRequest = await self._read(request, ImageRequest)
        if form.model is not None:
            self._check_model(form.model)
        if form.stream and form.n != 1:
            raise ApiError(400, "Only one picture can be streamed at a time.", param="n")
        if form.partial_images and not form.stream:
            raise ApiError(400, "partial_images needs stream.", param="partial_images")
        prompt = await self._prepare([{"role": "user", "content": form.prompt}], form, deadline)
        pieces: asyncio.Queue = asyncio.Queue()
        jobs, size = self._make_image_jobs(form, prompt, deadline, pieces if form.stream else None)
        self._submit(jobs)
        if form.stream:
            return _stream(self._stream_image(form, size, jobs[0], pieces), jobs)
        results: list[ImageResult] = await _wait(request, jobs, deadline)
        texts = [await anyio.to_thread.run_sync(to_base64, one.image, form.output_format) for one in results]
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [image_entry(one, text) for one, text in zip(results, texts, strict=True)],
                "size": size,
                "output_format": form.output_format,
                "usage": image_usage([one.usage for one in results]),
            }
        )

    # Their steps

    def _model(self) -> dict[str, Any]:
        modalities = ["text", "image"] if self._backend.pipeline is not None else ["text"]
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "lavit-hf",
            "max_model_len": self._backend.max_length,
            "output_modalities": modalities,
        }

    def _check_model(self, name: str) -> None:
        if name != self._name:
            message = f"There is no model {name[:100]!r} here, only {self._name!r}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def _read(self, request: Request, form: type) -> Any:
        """Reads a request, in time and up to its largest size."""
        most = self._limits.max_request_bytes
        too_large = ApiError(413, f"The request is larger than {most:,} bytes.", code="request_too_large")
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large
        body = bytearray()
        async with asyncio.timeout(self._limits.max_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
        return await anyio.to_thread.run_sync(parse, form, bytes(body))

    async def _prepare_chat(self, form: ChatRequest, deadline: float) -> Prompt:
        number = sum(part.type == "image_url" for one in form.messages for part in one.parts)
        if number > self._limits.max_images:
            raise ApiError(400, f"The request has {number} pictures; at most {self._limits.max_images} are taken.")
        # Before it is tokenized, which would take much of the server's memory.
        texts = [part.text for one in form.messages for part in one.parts if part.type == "text"]
        size = len(form.messages) + len(texts) + sum(map(len, texts))  # each of them becomes something, also if empty
        if size > self._backend.max_characters:
            room = f"{self._backend.max_length} tokens, at most {self._backend.max_characters:,} characters"
            message = f"The prompt is too long: the model has room for {room}."
            raise ApiError(400, message, code="context_length_exceeded")
        names = ("num_image_tokens", "keep_rate", "max_total_image_tokens", "visual_mode")
        return await self._prepare(form.messages, form, deadline, **{name: getattr(form, name) for name in names})

    async def _prepare(
        self, messages: Any, form: ChatRequest | ImageRequest, deadline: float, **options: Any
    ) -> Prompt:
        """Makes a prompt in one of few threads, as pictures are decoded there."""
        if form.is_drawing:
            self._check_can_draw()
            options |= {"generation_mode": "image", "negative_prompt": form.negative_prompt}

        def prepare() -> Prompt:
            return self._backend.prepare([self._read_message(one, deadline) for one in messages], **options)

        if self._preparing is None:
            self._preparing = anyio.CapacityLimiter(_PREPARING_THREADS)
        try:
            with anyio.fail_after(max(deadline - time.monotonic(), 0)):
                prompt = await anyio.to_thread.run_sync(prepare, limiter=self._preparing)
        except (TypeError, ValueError) as error:
            raise ApiError(400, str(error)) from error
        if prompt.length >= self._backend.max_length:
            raise self._too_long(prompt.length, 1)
        return prompt

    def _read_message(self, message: Any, deadline: float) -> dict[str, Any]:
        """A message as the processor takes it."""
        if isinstance(message, dict):
            return message
        role = "system" if message.role == "developer" else message.role
        parts = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image", "image": self._reader.read(part.image_url.url, deadline)}
            for part in message.parts
        ]
        return {"role": role, "content": parts}

    def _check_can_draw(self) -> None:
        if self._backend.pipeline is None:
            raise ApiError(400, "This server writes text only.", code="unsupported_modality", param="modalities")

    def _too_long(self, prompt: int, new: int) -> ApiError:
        message = f"The prompt may take up to {prompt} tokens, and {new} more may follow; the model has room for "
        message += f"{self._backend.max_length}."
        return ApiError(400, message, code="context_length_exceeded")

    def _check_number(self, name: str, value: int | None, most: int) -> None:
        if value is not None and value > most:
            raise ApiError(400, f"{name} is {value}; at most {most} is taken.", code="invalid_value", param=name)

    def _make_text_jobs(
        self, form: ChatRequest, prompt: Prompt, deadline: float, pieces: asyncio.Queue | None
    ) -> list[TextJob]:
        self._check_number("n", form.n, self._limits.max_answers)
        name = "max_tokens" if form.max_completion_tokens is None else "max_completion_tokens"
        wanted = getattr(form, name)
        self._check_number(name, wanted, self._limits.max_new_tokens)
        room = self._backend.max_length - prompt.length
        if wanted is not None and wanted > room:
            raise self._too_long(prompt.length, wanted)
        default = min(self._backend.default_max_tokens, self._limits.max_new_tokens, room)
        max_tokens = default if wanted is None else wanted
        self._check_number("min_tokens", form.min_tokens, max_tokens)
        if len(form.stop_words) > 4 or sum(map(len, form.stop_words)) > 1000:
            raise ApiError(400, "stop takes at most 4 words, of 1000 characters together.", param="stop")
        temperature = form.temperature or 0.0
        if form.num_beams > 1 and (temperature or form.stream or form.n > 1):
            raise ApiError(400, "num_beams goes with neither temperature, stream nor n.", param="num_beams")
        options = TextOptions(
            temperature=temperature,
            top_p=1.0 if form.top_p is None or not temperature else form.top_p,
            top_k=(form.top_k or 0) if temperature else 0,
            num_beams=form.num_beams,
            length_penalty=form.length_penalty,
            min_new_tokens=form.min_tokens,
            max_new_tokens=max_tokens if form.num_beams > 1 else None,
        )
        return [
            TextJob(
                prompt,
                deadline,
                options,
                max_tokens,
                self._backend.decode,
                self._backend.end_ids,
                form.stop_words,
                self._backend.byte_ids,
                seed,
                report=_reporter(pieces, index),
            )
            for index, seed in enumerate(_seeds(form))
        ]

    def _make_image_jobs(
        self, form: ChatRequest | ImageRequest, prompt: Prompt, deadline: float, pieces: asyncio.Queue | None
    ) -> tuple[list[ImageJob], str]:
        self._check_number("n", form.n, self._limits.max_answers)
        self._check_number("num_inference_steps", form.num_inference_steps, self._limits.max_steps)
        height, width = form.height_and_width
        pixels = PixelOptions(height, width, form.num_inference_steps, form.decoder_guidance_scale)
        sampling = {"temperature": form.temperature, "top_k": form.top_k, "top_p": form.top_p}
        if form.temperature == 0:
            sampling = {"do_sample": False}
        try:
            height, width = self._backend.check_pixels(pixels)
            codes = self._backend.complete_codes(
                prompt,
                guidance_scale=form.guidance_scale,
                min_new_tokens=form.min_drawn_tokens,
                max_new_tokens=form.max_drawn_tokens,
                image_end_bias=form.image_end_bias,
                **sampling,
            )
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        self._check_number("size", height * width, self._limits.max_drawn_pixels)
        if prompt.length + codes.max_new_tokens > self._backend.max_length:
            raise self._too_long(prompt.length, codes.max_new_tokens)
        partial = form.partial_images if isinstance(form, ImageRequest) else 0
        jobs = [
            ImageJob(
                prompt,
                deadline,
                codes,
                pixels,
                self._backend.end_of_image,
                partial,
                seed,
                report=_reporter(pieces, index),
            )
            for index, seed in enumerate(_seeds(form))
        ]
        return jobs, f"{width}x{height}"

    def _submit(self, jobs: Sequence[TextJob | ImageJob]) -> None:
        try:
            self._engine.submit(jobs)
        except (EngineClosed, QueueFull) as error:
            raise _as_api_error(error) from error

    async def _chat_in_pictures(self, request: Request, form: ChatRequest, deadline: float) -> Response:
        prompt = await self._prepare_chat(form, deadline)
        jobs, _ = self._make_image_jobs(form, prompt, deadline, None)
        self._submit(jobs)
        answer = ChatAnswer(self._name)
        if form.stream:
            return _stream(self._stream_pictures(form, answer, jobs), jobs)
        results: list[ImageResult] = await _wait(request, jobs, deadline)
        usage = chat_usage([one.usage for one in results])
        pictures = [await self._chat_image(one, form) for one in results]
        choices = [chat_choice(index, None, "stop", images=[one]) for index, one in enumerate(pictures)]
        return JSONResponse(answer.whole(choices, usage))

    @staticmethod
    async def _chat_image(result: ImageResult, form: ChatRequest) -> dict[str, Any]:
        text = await anyio.to_thread.run_sync(to_base64, result.image, form.output_format)
        return chat_image(text, form.output_format)

    async def _stream_text(
        self, form: ChatRequest, answer: ChatAnswer, jobs: list[TextJob], pieces: asyncio.Queue
    ) -> AsyncIterator[str]:
        for index in range(len(jobs)):
            yield server_sent(answer.piece(index, {"role": "assistant", "content": ""}))
        async for index, piece in _progress(jobs, pieces):
            if piece is None:
                yield ": waiting\n\n"
            elif isinstance(piece, TextResult):
                if piece.rest:
                    yield server_sent(answer.piece(index, {"content": piece.rest}))
                yield server_sent(answer.piece(index, {}, piece.finish_reason))
            else:
                yield server_sent(answer.piece(index, {"content": piece}))
        if form.stream_options and form.stream_options.include_usage:
            yield server_sent(answer.last(chat_usage([job.usage for job in jobs])))
        yield server_sent("[DONE]")

    async def _stream_pictures(
        self, form: ChatRequest, answer: ChatAnswer, jobs: list[ImageJob]
    ) -> AsyncIterator[str]:
        async for index, piece in _progress(jobs, asyncio.Queue()):
            if piece is None:
                yield ": drawing\n\n"
            else:
                images = [{**await self._chat_image(piece, form), "index": 0}]
                yield server_sent(answer.piece(index, {"role": "assistant", "content": "", "images": images}))
                yield server_sent(answer.piece(index, {}, "stop"))
        if form.stream_options and form.stream_options.include_usage:
            yield server_sent(answer.last(chat_usage([job.usage for job in jobs])))
        yield server_sent("[DONE]")

    async def _stream_image(
        self, form: ImageRequest, size: str, job: ImageJob, pieces: asyncio.Queue
    ) -> AsyncIterator[str]:
        async for _, piece in _progress([job], pieces):
            if piece is None:
                yield ": drawing\n\n"
                continue
            is_partial = isinstance(piece, PartialImage)
            name = "image_generation.partial_image" if is_partial else "image_generation.completed"
            event = {
                "type": name,
                "b64_json": await anyio.to_thread.run_sync(to_base64, piece.image, form.output_format),
                "created_at": int(time.time()),
                "size": size,
                "quality": "auto",
                "background": "opaque",
                "output_format": form.output_format,
            }
            if is_partial:
                event["partial_image_index"] = piece.index
            else:
                event |= {"usage": image_usage([job.usage]), "seed": job.seed, "flagged": piece.is_flagged}
            yield server_sent(event, name)


def _seeds(form: ChatRequest | ImageRequest) -> list[int]:
    seed = secrets.randbelow(2**32) if form.seed is None else form.seed
    # The first has that of the request, as if it were asked for alone.
    return [(seed + index) % 2**63 for index in range(form.n)]


def _reporter(pieces: asyncio.Queue | None, index: int) -> Callable[[Any], object] | None:
    """What brings progress from the engine's threads into this one."""
    if pieces is None:
        return None
    loop = asyncio.get_running_loop()

    def report(progress: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(pieces.put_nowait, (index, progress))

    return report


async def _wait(request: Request, jobs: Sequence[TextJob | ImageJob], deadline: float) -> list[Any]:
    """Waits for all jobs, unless the client goes away."""
    done: asyncio.Future[list[Any]] = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    gone: asyncio.Future[None] = asyncio.ensure_future(_disconnect(request))
    either: set[asyncio.Future] = {done, gone}
    try:
        left = max(deadline - time.monotonic(), 0)
        await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise _as_api_error(JobCancelled() if gone.done() else JobTimeout())
        return done.result()
    except (EngineClosed, JobCancelled, JobTimeout, WorkerDied) as error:
        raise _as_api_error(error) from error
    finally:
        for job in jobs:
            job.cancel()
        for future in (done, gone):
            future.cancel()
        await asyncio.gather(done, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _progress(
    jobs: Sequence[TextJob | ImageJob], pieces: asyncio.Queue
) -> AsyncIterator[tuple[int, Any | None]]:
    """Pieces of jobs as they come, and their results; `None` where nothing has come for a while."""
    loop = asyncio.get_running_loop()
    for index, job in enumerate(jobs):
        job.future.add_done_callback(_forward(loop, pieces, index))
    left = len(jobs)
    deadline = jobs[0].deadline
    while left:
        if time.monotonic() > deadline + 1:
            raise JobTimeout
        try:
            index, piece = await asyncio.wait_for(pieces.get(), _KEEP_ALIVE_SECONDS)
        except TimeoutError:
            yield 0, None
            continue
        if isinstance(piece, BaseException):
            raise piece
        left -= isinstance(piece, (TextResult, ImageResult))
        yield index, piece


def _forward(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue, index: int) -> Callable[[Any], None]:
    def forward(future: Any) -> None:
        if not loop.is_closed():
            end = future.exception() or future.result()
            loop.call_soon_threadsafe(pieces.put_nowait, (index, end))

    return forward


def _stream(events: AsyncIterator[str], jobs: Sequence[TextJob | ImageJob]) -> StreamingResponse:
    """Sends events; jobs end with the stream, whoever ends it."""

    async def send() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        except (EngineClosed, JobCancelled, JobTimeout, WorkerDied) as error:
            yield server_sent(_as_api_error(error).body, "error")
        finally:
            for job in jobs:
                job.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(send(), media_type="text/event-stream", headers=headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        known = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path[:100]}")
    else:
        known = _as_api_error(error)
    return JSONResponse(known.body, known.status, known.headers)


def create_app(
    engine: Engine,
    backend: TransformersBackend,
    name: str,
    limits: ServingLimits | None = None,
    api_key: str | None = None,
    allowed_url_prefixes: Sequence[str] = (),
    drain_seconds: float = 30.0,
) -> Any:
    """Makes the application.

    Args:
        engine: What works on jobs; it is closed with the application.
        backend: What prompts are prepared with.
        name: The model's, for clients.
        limits: What a request may ask for.
        api_key: What clients send as `Authorization: Bearer`; by default everybody is let in.
        allowed_url_prefixes: Of addresses of pictures that may be fetched; none by default.
        drain_seconds: How long work may go on after the end was asked for.

    Returns:
        An ASGI application.

    Raises:
        ValueError: A prefix is none, or the key is empty.
    """
    limits = limits or ServingLimits()
    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        raise ValueError("The API key must be some letters of ASCII.")
    reader = PictureReader(limits.max_image_bytes, limits.max_image_pixels, allowed_url_prefixes)
    api = Api(engine, backend, name, limits, reader)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close, drain_seconds)

    routes = [
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/images/generations", api.images, methods=["POST"]),
    ]
    handlers: Any = dict.fromkeys((ApiError, ClientDisconnect, HTTPException, TimeoutError, Exception), _answer_error)
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Gate(app, engine, limits, api_key)


__all__ = ["Api", "Gate", "ServingLimits", "create_app"]
