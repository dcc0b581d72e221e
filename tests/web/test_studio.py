"""What the page asks of a checkpoint, without a page."""

import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import lavit_hf.web
from lavit_hf import default_checkpoint
from lavit_hf.pipelines.image_to_text import ANSWER, CAPTION, generate_text, merge_options, question_prompt
from lavit_hf.web import Studio, given_examples, make_examples, world_of
from web.conftest import TINY


def written(studio: Studio, picture: Image.Image, prompt: str, options: dict, num_tokens: int | None = None) -> str:
    options = merge_options(studio.model, options, {"num_beams": 1})
    del options["length_penalty"]
    return generate_text(studio.model, studio.processor, [picture], [prompt], options, None, num_tokens)[0]


def test_what_is_exported_is_there() -> None:
    assert all(getattr(lavit_hf.web, name) is not None for name in lavit_hf.web.__all__)


def test_tokens_are_those_that_the_processor_makes(studio: Studio, picture: Image.Image) -> None:
    for budget in (None, 5):
        look = studio.look(picture, budget)
        processor = studio.processor
        (ids,) = processor.tokenize_images(picture, num_image_tokens=budget)
        assert [token.index for token in look.tokens] == ids[1:-1].tolist()
        assert all(token.index - studio.model.config.visual_token_offset == token.code for token in look.tokens)
        patches = [token.patch for token in look.tokens]
        assert patches == sorted(set(patches)) and max(patches) < look.num_patches == studio.num_patches
    assert len(look.tokens) == look.num_tokens == 5


def test_the_overlay_shows_what_was_kept(studio: Studio, picture: Image.Image) -> None:
    everything, few = studio.look(picture, studio.num_patches), studio.look(picture, 3)
    assert everything.overlay.tobytes() == picture.resize(everything.overlay.size, Image.Resampling.LANCZOS).tobytes()
    rows, columns = studio.grid
    whole, kept = everything.overlay, few.overlay
    width, height = whole.width / columns, whole.height / rows
    same = 0
    for patch in range(rows * columns):
        row, column = divmod(patch, columns)
        box = tuple(map(round, (column * width, row * height, (column + 1) * width, (row + 1) * height)))
        same += whole.crop(box).tobytes() == kept.crop(box).tobytes()
    assert same == 3


def test_cost_is_what_the_language_model_sees(studio: Studio, picture: Image.Image) -> None:
    look = studio.look(picture, 7)
    inputs = studio.processor(images=[picture], text="<image>", num_image_tokens=7, return_tensors="pt")
    assert look.positions == (inputs["input_ids"].shape[1], studio.num_patches + 2)
    output = studio.model(**inputs, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert held == look.positions[0] * look.cache_bytes


def test_the_cache_of_a_model_without_grouped_heads(studio: Studio, picture: Image.Image, monkeypatch) -> None:
    """GPT-2's configuration, say, has no `num_key_value_heads`."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    monkeypatch.setattr(studio.model.config, "text_config", SimpleNamespace(**sizes))
    assert studio.look(picture).cache_bytes == 2 * 3 * 64 * studio.model.dtype.itemsize


def test_known_pictures_have_the_same_code(studio: Studio) -> None:
    known = studio.known_pictures[0]
    tokens = studio.look(known).tokens
    assert all((0, token.patch) in token.known for token in tokens)  # it is one of them itself
    number, patch = next(place for token in tokens for place in token.known if place[0] != 0)
    codes = {token.patch: token.code for token in studio.look(studio.known_pictures[number]).tokens}
    assert codes[patch] in {token.code for token in tokens}
    assert all(not token.known for token in Studio(studio.model, studio.processor).look(known).tokens)


@pytest.mark.parametrize("budget", [None, 4])
def test_texts_grow_to_what_is_written_at_once(studio: Studio, picture: Image.Image, budget: int | None) -> None:
    captions = list(studio.caption(picture, budget))
    assert captions[-1] == written(studio, picture, "", CAPTION, budget).partition(".")[0]
    assert len(captions) > 3 and all(captions[-1].startswith(one) for one in captions)
    question = make_examples(world_of(default_checkpoint())).questions[0]
    answers = list(studio.answer(picture, f" {question} ", budget))
    assert answers[-1] == written(studio, picture, question_prompt(question), ANSWER, budget)


def test_nothing_is_written_for_who_has_left(studio: Studio, picture: Image.Image, monkeypatch) -> None:
    monkeypatch.setattr(studio.model.generation_config, "max_new_tokens", 400)
    monkeypatch.setattr(studio.model.generation_config, "min_new_tokens", 400)
    before = threading.active_count()
    texts = studio._write(picture, "", CAPTION, None)
    assert next(texts)
    texts.close()
    assert threading.active_count() == before


def test_errors_of_the_model_reach_who_reads(studio: Studio, picture: Image.Image, monkeypatch) -> None:
    monkeypatch.setattr(studio.model, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(studio.caption(picture))


def test_a_seed_draws_one_picture(studio: Studio, picture: Image.Image) -> None:
    steps: list[tuple[int, int]] = []
    prompt = make_examples(world_of(default_checkpoint())).prompts[0]
    one = studio.draw(prompt, seed=3, num_inference_steps=4, progress=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again, other = (studio.draw(prompt, seed=seed, num_inference_steps=4).image for seed in (3, 4))
    assert one.image.tobytes() == again.tobytes() != other.tobytes()
    assert 1 <= one.num_tokens <= studio.num_patches
    with_picture = studio.draw(prompt, [picture], seed=3, num_inference_steps=4).image
    assert with_picture.tobytes() != one.image.tobytes()


def test_a_picture_is_drawn_from_its_tokens(studio: Studio, picture: Image.Image) -> None:
    steps: list[tuple[int, int]] = []
    drawn = studio.redraw(picture, 6, num_inference_steps=4, progress=lambda *step: steps.append(step))
    assert drawn.num_tokens == 6 and steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    generator = torch.Generator().manual_seed(0)
    expected = studio.pipeline.reconstruct(picture, num_image_tokens=6, num_inference_steps=4, generator=generator)
    assert drawn.image.tobytes() == expected.images[0].tobytes()


def test_bad_input_is_refused_in_words(studio: Studio, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="question is empty"):
        next(studio.answer(picture, " "))
    with pytest.raises(ValueError, match="cannot be part of a question"):
        next(studio.answer(picture, "What is <image>?"))
    with pytest.raises(ValueError, match="say what to draw"):
        studio.draw(" ")
    with pytest.raises(ValueError, match=f"1 to {studio.num_patches} tokens"):
        studio.look(picture, studio.num_patches + 1)


def test_a_checkpoint_of_no_world_that_cannot_draw(tmp_path) -> None:
    from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration

    LavitForConditionalGeneration.from_pretrained(TINY).save_pretrained(tmp_path)
    ImageTextProcessor.from_pretrained(TINY).save_pretrained(tmp_path)
    assert Studio.from_pretrained(str(tmp_path)).pipeline is None
    assert Studio.from_pretrained(str(TINY)).pipeline is not None
    assert world_of(str(tmp_path)) is None
    (tmp_path / "metrics.json").write_text('{"results": [{"data": "me/pictures"}, {"data": "emoji"}]}')
    assert world_of(str(tmp_path)).name == "emoji"
    examples = given_examples([Image.new("RGB", (9, 9))], "Why?", "a hat")
    assert (examples.questions, examples.prompts, len(examples.known)) == (["Why?"], ["a hat"], 1)
