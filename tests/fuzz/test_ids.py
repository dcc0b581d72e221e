"""Sequences of ids, as models write them and as nobody should: decoded, taken apart, drawn, and gone on from."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fuzz.runner import CLEAR, attempt, blocks, check_all, seeded_rng
from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.pipelines import LavitPixelDecoderPipeline

NAMES = "id|ids|prompt|integer|sequence|code|tensor|placeholder"


class Parts:
    """What is given ids: a model, its processor and its pixel decoder."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = LavitForConditionalGeneration.from_pretrained(checkpoint)
        self.processor = ImageTextProcessor.from_pretrained(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.pixel_decoder = LavitPixelDecoderPipeline.from_pretrained(checkpoint)
        self.pixel_decoder.set_progress_bar_config(disable=True)
        self.latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.start, self.end = self.tokenizer.boi_token_id, self.tokenizer.eoi_token_id
        self.placeholder = self.tokenizer.image_token_id
        self.codes = range(self.end + 1, self.end + 1 + self.tokenizer.codebook_size)
        self.max_codes = self.pixel_decoder.token_decoder.config.num_queries

    def is_known(self, index: Any) -> bool:
        return 0 <= index < len(self.tokenizer)

    def draw(self, **options: Any) -> torch.Tensor:
        options |= {"num_inference_steps": 1, "latents": self.latents, "guidance_scale": 1.0}
        return self.pixel_decoder(**options, output_type="latent").images


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> Parts:
    return Parts(tiny_checkpoint)


def write_ids(rng: random.Random, parts: Parts, *, may_be_wrong: bool = True) -> list[int]:
    """Ids of text, images, and strays; now and then some that there are not."""
    ids: list[int] = []
    for _ in range(rng.choice([0, 1, 2, 4, 8])):
        kind = rng.randrange(7)
        codes = [rng.choice(parts.codes) for _ in range(rng.choice([0, 1, 3, 16, 17]))]
        if kind < 3:
            ids += [rng.randrange(parts.start) for _ in range(rng.randint(1, 6))]
        elif kind == 3:
            ids += [parts.start, *codes, parts.end]
        elif kind == 4:
            ids += codes
        elif kind == 5:
            ids += [parts.start, *[parts.placeholder] * rng.choice([1, 5, 16]), parts.end]
        else:
            ids += [rng.choice([parts.start, parts.end, parts.placeholder, *parts.tokenizer.all_special_ids])]
    if may_be_wrong and rng.random() < 0.25:
        size = len(parts.tokenizer)
        wrong = [-1, -100, -(2**31), size, size + 1, 10**6, 2**31, 2**32, 2**63 - 1]
        ids.insert(rng.randint(0, len(ids)), rng.choice(wrong))
    return ids


def as_any_type(rng: random.Random, ids: list[int]) -> Any:
    """Ids as a list, a tuple, an array, a tensor, or NumPy's integers."""
    kind = rng.randrange(6)
    fits = all(-(2**31) <= index < 2**31 for index in ids)
    if kind == 0:
        return torch.tensor(ids, dtype=rng.choice([torch.int64, torch.int32]) if fits else torch.int64)
    if kind == 1:
        return np.array(ids, dtype=rng.choice(["int64", "int32"]) if fits else "int64")
    if kind == 2:
        return [np.int64(index) for index in ids]
    return tuple(ids) if kind == 3 else ids


def odd_ids(rng: random.Random) -> Any:
    """Something that is no sequence of ids."""
    odd = [None, "a", 1.5, [1.5], [None], ["5"], torch.tensor([0.5]), np.array([0.5]), object()]
    return rng.choice([*odd, [2**70]])


def check_decode(rng: random.Random, parts: Parts) -> None:
    """Known ids are decoded; others are refused, or do not count. Rows of a batch do not see one another."""
    rows = [write_ids(rng, parts) for _ in range(rng.choice([1, 2, 3]))]
    skip = rng.random() < 0.5
    texts = []
    for ids in rows:
        known = [index for index in ids if parts.is_known(index)]
        given = as_any_type(rng, ids)
        found = attempt(parts.tokenizer.decode, given, skip_special_tokens=skip, names=NAMES)
        expected = parts.tokenizer.decode(known, skip_special_tokens=skip)
        texts.append(found)
        if isinstance(found, CLEAR):
            assert known != ids, f"{given!r} is refused: {found}"
        else:
            assert found == expected, f"{given!r} became {found!r} instead of {expected!r}"
            hidden = {*parts.tokenizer.all_special_ids, *parts.codes, parts.start, parts.end, parts.placeholder}
            shown = [index for index in known if index not in hidden]
            assert not skip or found == parts.tokenizer.decode(shown), f"{given!r} shows control tokens: {found!r}"
        if known == ids:
            names = parts.tokenizer.convert_ids_to_tokens(ids)
            assert parts.tokenizer.convert_tokens_to_ids(names) == ids, f"{ids} became other ids by their names"
    together = attempt(parts.processor.batch_decode, rows, skip_special_tokens=skip, names=NAMES)
    if isinstance(together, CLEAR):
        assert any(not parts.is_known(index) for ids in rows for index in ids), f"{rows} is refused: {together}"
    else:
        alone = [text for text in texts if isinstance(text, str)]
        assert len(alone) < len(rows) or together == alone, f"{rows}: a batch is decoded differently"


def check_post_process(rng: random.Random, parts: Parts) -> None:
    """All codes come back in order, as images; unknown ids are refused, or do not count."""
    ids = write_ids(rng, parts)
    known = [index for index in ids if parts.is_known(index)]
    given = as_any_type(rng, ids)
    for mode in ("text", "image", "interleaved"):

        def process(ids: Any, mode: str = mode) -> list[Any]:
            rows = ids[None] if isinstance(ids, (torch.Tensor, np.ndarray)) else [ids]
            (row,) = parts.processor.post_process_multimodal_output(rows, generation_mode=mode)
            return as_lists(row)

        found = attempt(process, given, names=NAMES)
        if isinstance(found, CLEAR):
            assert known != ids, f"{mode} of {given!r} is refused: {found}"
        else:
            assert found == process(known), f"{mode} of {given!r} became {found!r}"
    codes = [index - parts.codes[0] for index in known if index in parts.codes]
    images = [part for part in process(known) if isinstance(part, list)]
    if parts.placeholder not in known:
        assert [code for image in images for code in image] == codes, f"{known} lost codes: {images}"
    image = parts.processor.post_process_multimodal_output([known], generation_mode="image")[0].tolist()
    assert not images or parts.placeholder in known or image == images[-1], f"{known}: {image} is not the last image"


def as_lists(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [as_lists(one) for one in value] if isinstance(value, list) else value


def check_pixel_decoder(rng: random.Random, parts: Parts) -> None:
    """Ids are drawn as their codes are; anything that is not one image is refused."""
    ids = write_ids(rng, parts)
    given = as_any_type(rng, ids)
    given = [given] if rng.random() < 0.5 else given
    codes = [index - parts.codes[0] for index in ids if index in parts.codes]
    found = attempt(parts.draw, input_ids=given, names=NAMES)
    is_known = all(map(parts.is_known, ids))
    if isinstance(found, CLEAR):
        positions = [position for position, index in enumerate(ids) if index in parts.codes]
        has_several = positions and parts.end in ids[positions[0] : positions[-1]]
        is_array = not isinstance(given, (list, tuple, torch.Tensor)) or isinstance(given, list)
        has_reason = not is_known or has_several or len(codes) > parts.max_codes or not ids or is_array
        assert has_reason, f"{given!r} is refused: {found}"
    else:
        # Ids behind the vocabulary may be text that a caller added; in an image there are none.
        assert is_known or min(ids) >= 0, f"{given!r} is drawn"
        expected = parts.draw(codes=[torch.tensor(codes, dtype=torch.long)])
        assert torch.equal(found, expected), f"{given!r} is drawn as something else than its codes"


def check_generate(rng: random.Random, parts: Parts) -> None:
    """Prompts are gone on from with known ids and come back as they were; others are refused."""
    ids = write_ids(rng, parts)[:100]
    mode = rng.choice(["text", "text", "interleaved", "image"])
    # Options, and those of images apart, as most calls give them.
    options = {"max_new_tokens": 3, "do_sample": False, "generation_mode": mode}
    found = attempt(parts.model.generate, torch.tensor([ids], dtype=torch.long), names=NAMES, **options)
    has_features = parts.placeholder in ids
    if isinstance(found, CLEAR):
        has_reason = not ids or has_features or not all(map(parts.is_known, ids)) or mode == "image"
        assert has_reason, f"{ids} is refused: {found}"
        return
    assert all(map(parts.is_known, ids)) and not has_features, f"{ids} is gone on from without an error"
    (row,) = found.tolist()
    assert row[: len(ids)] == ids and all(map(parts.is_known, row)), f"{ids} came back as {row}"
    new = set(row[len(ids) :])
    assert parts.placeholder not in new, f"{ids}: a placeholder is generated"
    if mode == "text":
        assert not new & {parts.start, parts.end, *parts.codes}, f"{ids}: visual ids in text {row}"
    if mode == "image":
        padding = set(parts.tokenizer.all_special_ids)
        assert not new - {parts.end, *parts.codes} - padding, f"{ids}: text in an image {row}"


def check_odd(rng: random.Random, parts: Parts) -> None:
    """What is no sequence of ids is refused."""
    given = odd_ids(rng)
    calls = {
        "decode": lambda: parts.tokenizer.decode(given),
        "batch_decode": lambda: parts.processor.batch_decode(given),
        "split_images": lambda: parts.tokenizer.split_images(given),
        "convert_codes_to_ids": lambda: parts.tokenizer.convert_codes_to_ids(given),
        "convert_ids_to_codes": lambda: parts.tokenizer.convert_ids_to_codes(given),
        "post_process": lambda: parts.processor.post_process_multimodal_output(given, generation_mode="interleaved"),
        "pixel decoder": lambda: parts.draw(input_ids=given),
    }
    name = rng.choice(list(calls))
    try:
        found = attempt(calls[name])
    except Exception as error:
        raise AssertionError(f"{name} of {given!r}: {type(error).__name__}: {error}") from error
    assert isinstance(found, CLEAR), f"{name} takes {given!r} for ids and gives {found!r}"


def check_codes(rng: random.Random, parts: Parts) -> None:
    """Codes become ids and back; what is no code is refused by its value."""
    codes = [rng.randrange(parts.tokenizer.codebook_size) for _ in range(rng.choice([0, 1, 5]))]
    given = as_any_type(rng, codes)
    ids = parts.tokenizer.convert_codes_to_ids(given)
    assert type(ids) is type(given) and list(map(int, ids)) == [parts.codes[code] for code in codes]
    assert list(map(int, parts.tokenizer.convert_ids_to_codes(ids))) == codes
    wrong = rng.choice([-1, parts.tokenizer.codebook_size, 2**40])
    refused = attempt(parts.tokenizer.convert_codes_to_ids, [*codes, wrong], names=str(wrong))
    assert isinstance(refused, CLEAR), f"{wrong} is taken for a code"


CHECKS = [check_decode, check_post_process, check_pixel_decoder, check_generate, check_odd, check_codes]


@blocks("ids")
def test_ids(seeds: list[int], parts: Parts) -> None:
    def check(seed: int) -> None:
        rng = seeded_rng("ids", seed)
        rng.choices(CHECKS, [3, 3, 2, 3, 2, 1])[0](rng, parts)

    check_all(seeds, check, seconds=120)
