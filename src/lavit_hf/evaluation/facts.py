"""Compares what is said about a scene, or seen in a picture of it, with the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..data.worlds import WORLDS, World
from .measurement import Measurement, measure_clusters

WHOLE = "fully_right"
_COUNT = "object_count"
_SCENES = WORLDS["scenes"]

Comparison = dict[str, tuple[int, int]]
"""For each part, how many are right, and out of how many."""


def read_facts(caption: str, world: World = _SCENES) -> Any | None:
    """Reads what a caption says, or `None` if it is not worded as captions of the world are."""
    return world.parse_caption(caption)


def compare_facts(found: Any | None, truth: Any, world: World = _SCENES) -> Comparison:
    """Compares facts with the truth.

    Objects have no names, so each part, such as their colors, is compared as a multiset. Objects too many are as wrong
    as objects too few. A relation is right only if both its objects are.

    Args:
        found: What was said or seen; `None` if it was not understood, which makes everything wrong.
        truth: The scene.
        world: The world that both are of.
    """
    right = world.facts_of(truth)
    found_parts, right_parts = world.parts_of(found), world.parts_of(right)
    num_found = 0 if found is None else len(found.objects)
    comparison = {WHOLE: (int(found == right), 1)}
    for part in world.fact_units:
        comparison[part] = (
            (int(num_found == len(right.objects)), 1)
            if part == _COUNT
            else _compare_multisets(found_parts[part], right_parts[part])
        )
    return comparison


def _compare_multisets(found: Sequence, right: Sequence) -> tuple[int, int]:
    return (Counter(found) & Counter(right)).total(), max(len(found), len(right))


def wrong_parts(comparison: Comparison) -> list[str]:
    """Names the parts that are not all right."""
    wrong = [part for part, (right, total) in comparison.items() if right < total]
    # The right colors and the right shapes may still be put together wrongly.
    return [part for part in wrong if part != WHOLE] or ["combination" for _ in wrong]


def measure_facts(
    comparisons: Iterable[Comparison], prefix: str = "", world: World = _SCENES
) -> dict[str, Measurement]:
    """Sums comparisons up: the share that is right, for each part. Objects of a scene may be wrong together."""
    comparisons = list(comparisons)
    return {
        prefix + part: measure_clusters(
            [comparison[part][0] for comparison in comparisons],
            [comparison[part][1] for comparison in comparisons],
            unit,
        )
        for part, unit in {WHOLE: "scenes", **world.fact_units}.items()
    }


__all__ = ["WHOLE", "Comparison", "compare_facts", "measure_facts", "read_facts", "wrong_parts"]
