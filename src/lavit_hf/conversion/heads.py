"""Numbers of attention heads, which no tensor shape tells."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import ConversionError

PUBLISHED_WIDTH = 1408
PUBLISHED_HEADS = {"vision": 16, "merger": 16, "decoder": 16}


def parse_heads(text: str) -> dict[str, int]:
    """Parses `"vision=16,merger=16,decoder=16"`.

    Args:
        text: Comma-separated assignments; each of `vision`, `merger` and `decoder` at most once.

    Returns:
        The numbers by part.
    """
    heads: dict[str, int] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        part, _, number = (piece.strip() for piece in item.partition("="))
        if part in heads:
            raise ConversionError(f"--heads names {part} twice.")
        if not number.isdecimal():
            raise ConversionError(f"--heads: expected PART=NUMBER as in vision=16,merger=16,decoder=16, got {item!r}.")
        heads[part] = int(number)
    return heads


def resolve_heads(width: int, heads: Mapping[str, int] | str | None, parts: list[str]) -> dict[str, int]:
    """Fills in the published numbers at the published width and insists on explicit ones at any other.

    Args:
        width: Width of the visual features.
        heads: What the user gave.
        parts: The parts the checkpoint has.

    Returns:
        The number of heads of every part of the checkpoint.
    """
    given = parse_heads(heads) if isinstance(heads, str) else dict(heads or {})
    if unknown := sorted(set(given) - set(PUBLISHED_HEADS)):
        raise ConversionError(f"--heads: unknown part {', '.join(unknown)}; known are vision, merger and decoder.")
    known = {**PUBLISHED_HEADS, **given} if width == PUBLISHED_WIDTH else given
    if missing := [part for part in parts if part not in known]:
        example = ",".join(f"{part}=4" for part in parts)
        raise ConversionError(
            f"The numbers of attention heads cannot be read off the tensors, and at a width of {width} (the published "
            f"checkpoints have {PUBLISHED_WIDTH}) there is no default. Missing: {', '.join(missing)}. Pass them, for "
            f"example --heads {example}"
        )
    for part in parts:
        if known[part] < 1 or width % known[part]:
            raise ConversionError(f"--heads {part}={known[part]}: the width {width} is not a multiple of it.")
    return {part: known[part] for part in parts}
