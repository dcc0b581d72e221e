"""Placeholder of this branch: metrics are made elsewhere, behind the same names."""

from __future__ import annotations

from typing import Any


class _ExactMatch:
    def compute(self, predictions: list[str], references: list[Any]) -> dict[str, Any]:
        def clean(text: str) -> str:
            return " ".join(text.lower().split()).rstrip(".")

        scores = []
        for prediction, right in zip(predictions, references, strict=True):
            right = [right] if isinstance(right, str) else right
            scores.append(float(clean(prediction) in [clean(text) for text in right]))
        return {"exact_match": sum(scores) / len(scores), "scores": scores}


def load_metric(name: str, **kwargs: Any) -> Any:
    if name != "exact_match":
        raise ValueError(f"There is no metric {name!r} on this branch.")
    return _ExactMatch()
