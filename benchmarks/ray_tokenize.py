"""What a second actor of Ray Data brings to tokenizing, and whether four lose anything.

    python benchmarks/ray_tokenize.py [--checkpoint DIR] [--pictures 2000] [--repeats 5]

Needs `pip install 'lavit-hf[ray]'`, and as many idle cores as actors: each has one torch thread. One and two actors
take turns in the same run, and a rate is of the time in which all actors are at work, without their start. Four, of
which the machine may have too few cores, are counted only: pictures lost, pictures twice, codes that differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")  # or whatever else runs has precedence

import numpy as np
import ray
from ray import data

from lavit_hf import default_checkpoint
from lavit_hf.batch import Tokenizer
from lavit_hf.data.worlds import find_world

BATCH_SIZE = 32


class TimedTokenizer(Tokenizer):
    """Says when it was done, and which of the actors it is."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        made = super().__call__(batch)
        count = len(batch["id"])
        return {**made, "at": np.full(count, time.monotonic()), "actor": np.full(count, os.getpid())}


def tokenize(rows: list[dict[str, Any]], checkpoint: str, num_actors: int) -> list[dict[str, Any]]:
    """All rows with their codes."""
    blocks = data.from_items(rows, override_num_blocks=max(len(rows) // BATCH_SIZE, 1))
    return (
        blocks.map_batches(
            TimedTokenizer,
            fn_constructor_kwargs={"checkpoint": checkpoint, "num_threads": 1},
            batch_size=BATCH_SIZE,
            compute=data.ActorPoolStrategy(size=num_actors),
        )
        .drop_columns(["image"])
        .take_all()
    )


def codes_of(row: dict[str, Any]) -> list[list[int]]:
    """The codes of a row's pictures."""
    return [[int(code) for code in of_picture] for of_picture in row["codes"]]


def rate(done: list[dict[str, Any]]) -> float:
    """Pictures per second while all actors are at work."""
    by_actor: dict[int, list[float]] = {}
    for row in done:
        by_actor.setdefault(row["actor"], []).append(row["at"])
    start = max(min(times) for times in by_actor.values())
    end = min(max(times) for times in by_actor.values())
    return sum(start < at <= end for times in by_actor.values() for at in times) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=default_checkpoint())
    parser.add_argument("--world", default="scenes", help="what the pictures are of")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    world = find_world(args.world)
    pictures = [world.render(world.sample_scene(world.splits[1], 0, index)) for index in range(args.pictures)]
    rows = [{"id": index, "image": np.asarray(picture)} for index, picture in enumerate(pictures)]
    ray.init(num_cpus=4, include_dashboard=False)
    data.DataContext.get_current().enable_progress_bars = False
    ratios = []
    for _ in range(args.repeats):
        one, two = (tokenize(rows, args.checkpoint, number) for number in (1, 2))
        ratios.append(rate(two) / rate(one))
        print(f"pictures/s: {rate(one):.0f} by one actor, {rate(two):.0f} by two", flush=True)
    print(f"two are {statistics.median(ratios):.2f}x one (median; {min(ratios):.2f} to {max(ratios):.2f})")
    four = tokenize(rows, args.checkpoint, 4)
    codes = {row["id"]: codes_of(row) for row in one}
    numbers = [row["id"] for row in four]
    print(
        f"four: {len(set(codes) - set(numbers))} lost, {len(numbers) - len(set(numbers))} twice, "
        f"{sum(bool(row['error']) for row in four)} errors, "
        f"{sum(codes_of(row) != codes[row['id']] for row in four)} with other codes"
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
