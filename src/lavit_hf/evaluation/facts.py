"""Compares what is said about a scene, or seen in a picture of it, with the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..data.scenes import CaptionError, Facts, Scene, facts_of, parse_caption
from .measurement import Measurement, measure_share

WHOLE = "fully_right"
# What is counted once per scene, per object, and per relation.
UNITS = {
    WHOLE: "scenes",
    "background": "scenes",
    "object_count": "scenes",
    "color": "objects",
    "shape": "objects",
    "size": "objects",
    "relation": "relations",
}

Comparison = dict[str, tuple[int, int]]
"""For each part, how many are right, and out of how many."""


def read_facts(caption: str) -> Facts | None:
    """Reads what a caption says, or `None` if it is not worded as captions of scenes are."""
    try:
        return parse_caption(caption)
    except CaptionError:
        return None


def compare_facts(found: Facts | None, truth: Scene) -> Comparison:
    """Compares facts with the truth.

    Objects have no names, so colors are compared as multisets, and shapes and sizes likewise. Objects too many are as
    wrong as objects too few. A relation is right only if both its objects are.

    Args:
        found: What was said or seen; `None` if it was not understood, which makes everything wrong.
        truth: The scene.
    """
    right = facts_of(truth)
    found = Facts("", (), ()) if found is None else found
    return {
        WHOLE: (int(found == right), 1),
        "background": (int(found.background == right.background), 1),
        "object_count": (int(len(found.objects) == len(right.objects)), 1),
        **{
            part: _compare_multisets(
                [getattr(item, part) for item in found.objects], [getattr(item, part) for item in right.objects]
            )
            for part in ("color", "shape", "size")
        },
        "relation": _compare_multisets(found.relations, right.relations),
    }


def _compare_multisets(found: Sequence, right: Sequence) -> tuple[int, int]:
    return (Counter(found) & Counter(right)).total(), max(len(found), len(right))


def wrong_parts(comparison: Comparison) -> list[str]:
    """Names the parts that are not all right."""
    wrong = [part for part, (right, total) in comparison.items() if right < total]
    # The right colors and the right shapes may still be put together wrongly.
    return [part for part in wrong if part != WHOLE] or ["combination" for _ in wrong]


def measure_facts(comparisons: Iterable[Comparison], prefix: str = "") -> dict[str, Measurement]:
    """Sums comparisons up: the share that is right, for each part."""
    comparisons = list(comparisons)
    return {
        prefix + part: measure_share(
            sum(comparison[part][0] for comparison in comparisons),
            sum(comparison[part][1] for comparison in comparisons),
            unit,
        )
        for part, unit in UNITS.items()
    }


__all__ = ["WHOLE", "Comparison", "compare_facts", "measure_facts", "read_facts", "wrong_parts"]
