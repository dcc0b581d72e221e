"""`lavit caption` and `lavit ask`: the original's texts, from files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lavit_cli import generation
from lavit_cli.generation import first_sentence
from lavit_hf.utils.progress import TokenProgress


@pytest.fixture
def pictures(original_dir: Path) -> list[Path]:
    return [original_dir / "images" / f"{index}.png" for index in range(3)]


def decode(processor, ids: torch.Tensor) -> list[str]:
    return [" ".join(text.split()) for text in processor.batch_decode(ids, skip_special_tokens=True)]


def test_captions_are_the_original_ones(lavit, pictures, checkpoint, golden, processor) -> None:
    expected = [first_sentence(text) for text in decode(processor, golden["caption_beam2_ids"])]
    for batch_size in (1, 2, 8):
        result = lavit("caption", *pictures, "-m", checkpoint, "--max-new-tokens", 12, "--batch-size", batch_size)
        assert result.exit_code == 0, result.output
        rows = [line.split("\t") for line in result.stdout.splitlines()]
        assert [name for name, _ in rows] == [str(path) for path in pictures]
        assert [text for _, text in rows] == expected


def test_one_caption_is_only_the_caption(lavit, pictures, checkpoint, golden, processor) -> None:
    (expected,) = decode(processor, golden["caption_beam2_ids"][:1])
    result = lavit("caption", pictures[0], "-m", checkpoint, "--max-new-tokens", 12)
    assert result.stdout == first_sentence(expected) + "\n"


def test_prompted_caption(lavit, pictures, checkpoint, golden, golden_meta, processor) -> None:
    expected = decode(processor, golden["caption_prompt_greedy_ids"])
    for picture, prompt, text in zip(pictures, golden_meta["caption_prompts"], expected, strict=True):
        options = ["--beams", 1, "--max-new-tokens", 12, "--prompt", prompt]
        assert lavit("caption", picture, "-m", checkpoint, *options).stdout == first_sentence(text) + "\n"


def test_answers_are_the_original_ones(lavit, pictures, checkpoint, golden, golden_meta, processor) -> None:
    expected = decode(processor, golden["vqa_beam5_ids"])
    for picture, question, answer in zip(pictures, golden_meta["questions"], expected, strict=True):
        result = lavit("ask", picture, question, "-m", checkpoint)
        assert result.exit_code == 0, result.output
        assert result.stdout == answer + "\n"


def test_budgets(lavit, pictures, checkpoint, model, processor) -> None:
    picture = Image.open(pictures[0])
    for command, prompt, arguments in (("caption", "", []), ("ask", "Question: what? Answer:", ["what?"])):
        texts = set()
        for budget in (1, 4, 16):
            options = ["--beams", 1, "--min-new-tokens", 8, "--max-new-tokens", 8, "--num-tokens", budget]
            result = lavit(command, pictures[0], *arguments, "-m", checkpoint, *options)
            inputs = processor(picture, f"<image>{prompt}", num_image_tokens=budget, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, min_new_tokens=8, max_new_tokens=8)
            (text,) = decode(processor, ids[:, inputs["input_ids"].shape[1] :])
            assert result.stdout == (first_sentence(text) if command == "caption" else text) + "\n"
            texts.add(text)
        assert len(texts) > 1
    result = lavit("caption", pictures[0], "-m", checkpoint, "--num-tokens", 17)
    assert result.exit_code == 1 and "An image has 1 to 16 tokens" in result.stderr


def test_regions(lavit, pictures, checkpoint, model, processor) -> None:
    picture = Image.open(pictures[0])
    boxes = [(0, 0, picture.width // 4, picture.height), (0, 0, picture.width, picture.height // 4)]
    texts = set()
    for command, prompt, arguments in (("caption", "", []), ("ask", "Question: what? Answer:", ["what?"])):
        for regions in ([], boxes[:1], boxes):
            options = ["--beams", 1, "--min-new-tokens", 8, "--max-new-tokens", 8, "--num-tokens", 3]
            for box in regions:
                options += ["--region", ",".join(map(str, box))]
            result = lavit(command, pictures[0], *arguments, "-m", checkpoint, *options)
            budget = {"num_image_tokens": 3, "regions": [regions] if regions else None}
            inputs = processor(picture, f"<image>{prompt}", **budget, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, min_new_tokens=8, max_new_tokens=8)
            (text,) = decode(processor, ids[:, inputs["input_ids"].shape[1] :])
            assert result.stdout == (first_sentence(text) if command == "caption" else text) + "\n"
            texts.add(text)
    assert len(texts) > 2
    for arguments, message in (
        ([pictures[0], "--region", "1,2,3"], "--region 1,2,3: a box is LEFT,TOP,RIGHT,BOTTOM in pixels"),
        ([pictures[0], "--region", "a,b,c,d"], "--region a,b,c,d: a box is"),
        ([*pictures[:2], "--region", "1,2,3,4"], "--region is a box in one picture; there are 2"),
        ([pictures[0], "--region", "0,0,9,9999"], "The box (0, 0, 9, 9999) is not in the image"),
    ):
        result = lavit("caption", *arguments, "-m", checkpoint)
        assert result.exit_code == 1 and message in result.stderr, result.stderr


def test_picture_without_tokens(lavit, checkpoint, processor, model, tmp_path: Path) -> None:
    white = Image.new("RGB", (56, 56), "white")
    pixel_values = processor.image_processor([white], return_tensors="pt")["pixel_values"]
    mask = torch.zeros(1, 16, dtype=torch.bool)
    # No patch of any picture is kept.
    model.visual_tokenizer.continuous.selector.out_proj_3.bias.data[0] -= 1000
    assert model.visual_tokenizer.embed(pixel_values).keep_mask.equal(mask)
    none_kept, path = tmp_path / "none-kept", tmp_path / "white.png"
    model.save_pretrained(none_kept)
    processor.save_pretrained(none_kept)
    white.save(path)
    result = lavit("caption", path, "-m", none_kept)
    assert result.exit_code == 0, result.output


def test_impossible_requests(lavit, pictures, checkpoint) -> None:
    too_short = lavit("caption", pictures[0], "-m", checkpoint, "--max-new-tokens", 4)
    assert "--min-new-tokens (8) is more than --max-new-tokens (4)" in too_short.stderr
    assert "empty" in lavit("ask", pictures[0], "  ", "-m", checkpoint).stderr
    assert "<image>" in lavit("ask", pictures[0], "What is <image>?", "-m", checkpoint).stderr


def test_half_precision_runs(lavit, pictures, checkpoint) -> None:
    result = lavit("caption", *pictures, "-m", checkpoint, "--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 3


def test_first_sentence() -> None:
    assert first_sentence(" a cat\non a  mat. A dog.") == "a cat on a mat"
    assert first_sentence("no end") == "no end"
    assert first_sentence("") == ""


def test_progress_counts_tokens(checkpoint, pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavit_cli.loading import load

    counted = []
    monkeypatch.setattr(TokenProgress, "__call__", count(TokenProgress.__call__, counted))
    options = {"num_beams": 2, "min_new_tokens": 5, "max_new_tokens": 5}
    generation.generate_text(load(str(checkpoint)), [Image.open(pictures[0])], [""], options)
    assert len(counted) == 5


def count(function, calls: list):
    def wrapper(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("command", [("caption",), ("ask", "What is it?")])
def test_compiling_is_for_one_beam(lavit, photo: Path, command: tuple[str, ...]) -> None:
    name, *question = command
    result = lavit(name, photo, *question, "--compile")
    assert result.exit_code == 1 and "--compile goes with --beams 1" in result.output
