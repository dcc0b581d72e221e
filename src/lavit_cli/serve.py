"""`lavit serve`: answers requests over HTTP, as OpenAI's API does."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .checks import find_model, is_loopback, listen
from .options import Device, Dtype, PixelDecoder, RunDtype

_BACKLOG = 2048  # clients that may wait for the server to take them, as uvicorn has it


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint, or its name on the Hub.", show_default="lavit-emoji-small"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="that of the checkpoint")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LAVIT_API_KEY", help="What clients have to send; the variable shows it to nobody."),
    ] = None,
    allow_url_prefix: Annotated[
        list[str] | None,
        typer.Option(
            help="Addresses of pictures that may be fetched; may be given several times.", show_default="none"
        ),
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Draw nothing, and load no pixel decoder.")] = False,
    decoder: PixelDecoder = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most answers written at a time.")] = 8,
    max_draw_batch: Annotated[
        int | None, typer.Option(min=1, help="Most pictures drawn at a time.", show_default="as many")
    ] = None,
    batch_window: Annotated[
        float, typer.Option(min=0, max=10, help="Seconds for which a batch waits for more.")
    ] = 0.01,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Most requests, and most answers in work, at a time; others are told to wait.")
    ] = 256,
    max_seconds: Annotated[float, typer.Option(min=1, help="Longest time for a request.")] = 300.0,
    max_request_mb: Annotated[int, typer.Option(min=1, help="Largest request, in megabytes.")] = 32,
    max_images: Annotated[int, typer.Option(min=0, help="Most pictures in a request.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest text, in tokens.")] = 1024,
    max_answers: Annotated[int, typer.Option(min=1, help="Most texts or pictures of a request.")] = 4,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="For how long work goes on after SIGTERM or Ctrl+C.")
    ] = 30.0,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Answer requests over HTTP, as OpenAI's API does: text about pictures, and pictures.

    \b
    Examples:
      lavit serve lavit-7b-v2
      LAVIT_API_KEY=... lavit serve lavit-7b-v2 --host 0.0.0.0 --max-batch 16
    """
    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        raise ValueError("The API key must be some letters of ASCII.")
    checkpoint = find_model(model)
    listener = listen(host, port)

    from lavit_hf.serving import Engine, ServingLimits, TransformersBackend, create_app
    from lavit_hf.serving.pictures import parse_prefix
    from lavit_hf.utils.public_text import public_name

    from .loading import load, load_pipeline

    for prefix in allow_url_prefix or ():
        parse_prefix(prefix)
    lavit = load(checkpoint, device, dtype.value)
    try:
        pipeline = None if text_only else load_pipeline(lavit, decoder and decoder.value)
    except ValueError as error:
        raise ValueError(f"{error} With --text-only it is served all the same.") from error
    limits = ServingLimits(
        max_queue=max_queue,
        max_seconds=max_seconds,
        max_request_bytes=max_request_mb * 2**20,
        max_images=max_images,
        max_new_tokens=max_new_tokens,
        max_answers=max_answers,
    )
    backend = TransformersBackend(lavit.model, lavit.processor, pipeline)
    engine = Engine(backend, max_batch, max_draw_batch, batch_window, max_queue)
    served = name or public_name(checkpoint)
    app = create_app(engine, backend, served, limits, api_key, allow_url_prefix or (), drain_seconds)

    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Longer than clients keep connections (httpx 5 s): who closes first loses the request that crosses it.
        timeout_keep_alive=75,
        # So long requests may go on; the engine is closed after that.
        timeout_graceful_shutdown=int(drain_seconds) + 1,
    )
    address = f"[{host}]" if ":" in host else host
    listener.listen(_BACKLOG)  # from now on clients are kept waiting, not refused
    print(f"Serving {served} at http://{address}:{listener.getsockname()[1]}/v1 (Ctrl+C ends)", flush=True)
    if api_key is None and not is_loopback(listener):
        print("lavit: anybody who reaches this address may use it: set LAVIT_API_KEY", file=sys.stderr)
    uvicorn.Server(config).run(sockets=[listener])
