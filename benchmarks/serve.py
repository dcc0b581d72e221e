"""Load on `lavit serve`: many clients on loopback for a minute. Is every request answered, and does memory stay flat?

    python benchmarks/serve.py [--clients 200] [--seconds 60] [--model checkpoints/lavit-tiny-random] [--warmup 20]

Each client sends one request after the other, of four kinds in turn: a question, a question about a picture, the same
streamed, and a picture to draw. The server is a process of its own, so that its memory is its own. A request counts as
lost if it has any other end than an answer that is complete.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("text", "picture", "stream", "draw")


def messages(kind: str, picture: str) -> list[dict]:
    """A question, with a picture or without."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}
    text = {"type": "text", "text": "What animal is this?"}
    return [{"role": "user", "content": [text] if kind == "text" else [image, text]}]


async def ask(client: openai.AsyncOpenAI, kind: str, picture: str) -> None:
    """Sends a request, and checks that its answer is complete."""
    if kind == "draw":
        answer = await client.images.generate(
            model="lavit", prompt="a cat", extra_body={"num_inference_steps": 4, "seed": 1}
        )
        assert answer.data[0].b64_json
        return
    options = {"model": "lavit", "messages": messages(kind, picture), "max_tokens": 12}
    if kind == "stream":
        reasons = [
            chunk.choices[0].finish_reason
            async for chunk in await client.chat.completions.create(stream=True, **options)
        ]
        assert reasons[-1] in ("stop", "length")
        return
    answer = await client.chat.completions.create(**options)
    assert answer.choices[0].finish_reason in ("stop", "length")


async def load(url: str, clients: int, seconds: float, server: psutil.Process) -> None:
    """Sends requests for so many seconds, and prints what became of them."""
    picture = base64.b64encode((ROOT / "examples" / "images" / "chelsea.jpg").read_bytes()).decode()
    # Without second tries: what is lost counts.
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    times: dict[str, list[float]] = collections.defaultdict(list)
    lost: list[str] = []
    memory: list[float] = []
    started = time.monotonic()

    async def one(number: int) -> None:
        turn = number
        while time.monotonic() < started + seconds:
            kind, begun = KINDS[turn % len(KINDS)], time.monotonic()
            turn += 1
            try:
                await ask(client, kind, picture)
                times[kind].append(time.monotonic() - begun)
            except (openai.OpenAIError, AssertionError) as error:
                lost.append(f"{kind}: {error!r}, because of {error.__cause__!r}")

    async def watch() -> None:
        while True:
            memory.append(server.memory_info().rss / 2**20)
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(one(number) for number in range(clients)))
    watching.cancel()
    await client.close()
    elapsed = time.monotonic() - started
    answered = sum(map(len, times.values()))
    print(f"{clients} clients, {elapsed:.0f} s: {answered} answered ({answered / elapsed:.1f}/s), {len(lost)} lost")
    for kind in KINDS:
        ordered = sorted(times[kind])
        middle, late = statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))]
        print(f"  {kind:8} {len(ordered):6}  p50 {middle:6.2f} s  p95 {late:6.2f} s")
    quarter = max(len(memory) // 4, 1)
    parts = [statistics.mean(memory[index * quarter : (index + 1) * quarter]) for index in range(4)]
    print("  memory in MiB, by quarters: " + ", ".join(f"{part:.0f}" for part in parts))
    for line in lost[:5]:
        print("  lost:", line)


def main() -> None:
    """Starts a server, loads it, and ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warmup", type=float, default=20, help="seconds before those that count")
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "lavit-tiny-random"))
    parser.add_argument("--max-batch", type=int, default=32)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "lavit_cli", "serve", arguments.model, "--name", "lavit", "--port", "0"]
    command += ["--max-batch", str(arguments.max_batch), "--max-queue", str(2 * arguments.clients)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        url = process.stdout.readline().split()[3]
        server = psutil.Process(process.pid)
        asyncio.run(load(url, arguments.clients, arguments.warmup, server))
        asyncio.run(load(url, arguments.clients, arguments.seconds, server))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


if __name__ == "__main__":
    main()
