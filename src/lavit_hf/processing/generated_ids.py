"""What a model wrote, taken apart: text and images in one row of ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple

import torch


class IdRun(NamedTuple):
    """Consecutive ids of one kind.

    Attributes:
        kind: `"text"`; `"image"`; or `"features"`, an image of the prompt that entered as continuous features.
        ids: Text ids; codes (0 to K-1); or nothing for `"features"`.
    """

    kind: Literal["text", "image", "features"]
    ids: list[int]


class VisualIds(NamedTuple):
    """The ids that tell images from text: V, V+1, from V+2 on those of codes, and the placeholder's."""

    start: int
    end: int
    codes: range
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
        elif index in visual.codes:
            if state == "text":
                runs.append(IdRun("image", []))
                state = "bare"
            runs[-1].ids.append(index - visual.codes.start)
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
    """Ids of one sequence or several (a tensor, an array, a list of these) as lists of ints.

    Raises:
        ValueError: There are more dimensions than these two.
    """
    rows = ids.tolist() if hasattr(ids, "tolist") else ids  # at once: one by one would wait for a GPU each time
    values = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    if not values or not isinstance(values[0], (list, tuple)):
        return [values]
    rows = [list(row) for row in values]
    if any(isinstance(index, (list, tuple)) for row in rows for index in row):
        raise ValueError("Expected the ids of a sequence, or of a batch of them; got more than two dimensions.")
    return rows


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
