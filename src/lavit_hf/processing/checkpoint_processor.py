"""The files of a processor: which one is broken, and whether they fit the model that they stand beside."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.utils.hub import cached_file

from ..modeling.configuration_lavit import LavitConfig

_PROCESSOR_FILE = "processor_config.json"
_TOKENIZER_FILE = "tokenizer.json"
# Of what a processor and a tokenizer are made; at least one of the first must be there.
_FILES = {
    "processor": ((_PROCESSOR_FILE, "preprocessor_config.json"), ("tokenizer_config.json", _TOKENIZER_FILE)),
    "tokenizer": ((_TOKENIZER_FILE,), ("tokenizer_config.json",)),
}


def fit_to_model(processor: Any, checkpoint: str | os.PathLike, hub_kwargs: dict[str, Any]) -> int:
    """Compares a processor with the `config.json` beside it, if that is a LaVIT's.

    Args:
        processor: As its own files made it.
        checkpoint: Directory or Hub id of both.
        hub_kwargs: What locates it.

    Returns:
        Patches per image: what its own file says, or else what the model's configuration says.

    Raises:
        OSError: If neither file tells.
        ValueError: If the two do not fit.
    """
    files = {
        name: cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        for name in ("config.json", _PROCESSOR_FILE)
    }
    own = _read(files[_PROCESSOR_FILE]).get("image_seq_length")
    if _read(files["config.json"]).get("model_type") != LavitConfig.model_type:
        if own is None:
            raise OSError(
                f"{checkpoint} does not say how many patches an image has: {_PROCESSOR_FILE} is missing, or has no "
                "`image_seq_length`, and there is no config.json of a LaVIT. Save the processor there again."
            )
        return own
    config = LavitConfig.from_pretrained(checkpoint, **hub_kwargs)
    tokenizer, visual = processor.tokenizer, config.visual_tokenizer_config
    rows = config.text_config.vocab_size
    for index, token in tokenizer.added_tokens_decoder.items():
        if index >= rows and index != config.image_token_id:
            raise ValueError(
                f"{os.path.join(checkpoint, _TOKENIZER_FILE)} does not fit {files['config.json']}: the token "
                f"{token.content!r:.50} has the id {index}, but the model {rows} rows of embeddings. If you added "
                "tokens, call `model.resize_token_embeddings(len(processor.tokenizer))` before you save the model."
            )
    own = visual.num_patches if own is None else own
    for name, file, found, expected in (
        ("image_seq_length", _PROCESSOR_FILE, own, visual.num_patches),
        ("codebook_size", "tokenizer.json", tokenizer.codebook_size, visual.codebook_size),
        ("visual_token_offset", "tokenizer.json", tokenizer.visual_token_offset, config.visual_token_offset),
        ("image_token_id", "tokenizer.json", tokenizer.image_token_id, config.image_token_id),
    ):
        if found != expected:
            raise ValueError(
                f"{os.path.join(checkpoint, file)} does not fit {files['config.json']}: {name} is {found} by the "
                f"former and {expected} by the latter."
            )
    return own


@contextmanager
def name_broken_file(checkpoint: str | os.PathLike, kind: str = "processor") -> Iterator[None]:
    """Finds out which file is to blame when the processor or the tokenizer of a directory cannot be loaded.

    Args:
        checkpoint: The directory; nothing is found out about a repository.
        kind: What of it is loaded: `"processor"` or `"tokenizer"`.

    Raises:
        OSError: If a file is no JSON, or not what it should be.
        ValueError: If the values in one of them cannot be used.
    """
    try:
        yield
    except Exception as error:
        folder = Path(checkpoint)
        needed, others = _FILES[kind]
        if folder.is_dir() and not any((folder / name).is_file() for name in needed):
            raise OSError(f"{folder} has no {needed[0]}: save the {kind} there, too.") from error
        if not folder.is_dir() or str(folder) in str(error):
            raise
        present = [folder / name for name in needed + others if (folder / name).is_file()]
        for file in present:
            _read(file)
        for file in sorted(folder.glob("*.jinja")):
            try:
                file.read_text(encoding="utf-8")
            except ValueError as reason:
                raise OSError(f"{file} is not readable: {reason}") from error
        if (folder / _TOKENIZER_FILE) in present:
            _check_tokenizer(folder / _TOKENIZER_FILE)
        if not isinstance(error, AttributeError | LookupError | TypeError | ValueError):
            raise
        names = " or ".join(file.name for file in present if file.name != _TOKENIZER_FILE)
        raise ValueError(
            f"{folder}: no {kind} can be made of what its files say ({names}): {type(error).__name__}: {error}"
        ) from error


def _read(file: str | Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"{file} holds no JSON object.")
    return content


def _check_tokenizer(file: Path) -> None:
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise OSError(f"{file} holds no tokenizer: {error}") from error


__all__ = ["fit_to_model", "name_broken_file"]
