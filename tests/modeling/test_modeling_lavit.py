"""LavitModel and LavitForConditionalGeneration on tiny random models: both forms, budgets, one graph."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

import tiny_models
from lavit_hf import LavitForConditionalGeneration
from lavit_hf.modeling.cache_lavit import CACHE_NAME
from tiny_models import (
    NUM_IMAGES,
    NUM_PATCHES,
    ROWS,
    TEXT_VOCAB,
    attached_inputs,
    build_model,
    lavit_config,
    light_inputs,
    make_prompts,
    random_pixels,
)


@pytest.fixture(scope="module")
def tiny() -> LavitForConditionalGeneration:
    return build_model()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(NUM_IMAGES)


def text_logits(model, inputs):
    """Logits at text positions, row by row."""
    with torch.no_grad():
        logits = model(**inputs).logits
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    return [row[mask] for row, mask in zip(logits, is_text, strict=True)]


def test_both_forms_give_the_same_logits_at_text_positions(tiny, pixels):
    attached = text_logits(tiny, attached_inputs(tiny, pixels))
    light = text_logits(tiny, light_inputs(tiny, pixels))
    for one, other in zip(attached, light, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make_inputs", [light_inputs, attached_inputs])
def test_labeled_placeholders_teach_nothing(pixels, make_inputs):
    """TRL labels them, and applies the head to the base model's states itself."""
    model = build_model().train()
    inputs = make_inputs(model, pixels)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(inputs["attention_mask"][:, :-1] == 0, -100)  # nothing predicts these
    is_placeholder = labels == model.config.image_token_id
    num_learned = ((labels[:, 1:] >= 0) & ~is_placeholder[:, 1:] & ~is_placeholder[:, :-1]).sum()

    gradients = []
    for whose in ("ours", "theirs"):
        model.zero_grad()
        if whose == "ours":
            (model(**inputs, labels=labels).loss * num_learned).backward()
        else:
            states = model.base_model(**inputs).last_hidden_state[:, :-1]
            targets = labels[:, 1:].clamp_max(model.config.text_config.vocab_size - 1).flatten()
            nn.functional.cross_entropy(model.lm_head(states).flatten(0, 1), targets, reduction="sum").backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    assert gradients[0]["model.multi_modal_projector.weight"].abs().sum() > 0


def test_pixel_values_fit_attached_placeholders_too(tiny, pixels):
    inputs = attached_inputs(tiny, pixels)
    expected = tiny(**inputs).logits
    del inputs["image_features"]
    torch.testing.assert_close(tiny(**inputs, pixel_values=pixels).logits, expected)


def test_mm_encoder_outputs_are_used_as_they_are(tiny, pixels):
    inputs = light_inputs(tiny, pixels)
    expected = tiny(**inputs).logits
    encoded = tiny.get_image_features(pixel_values=inputs.pop("pixel_values"))
    torch.testing.assert_close(tiny(**inputs, mm_encoder_outputs={"image": encoded}).logits, expected)


def test_image_features_are_one_tensor_per_image(tiny, pixels):
    features = tiny.get_image_features(pixel_values=pixels)
    counts = tiny.visual_tokenizer.embed(pixels).num_tokens.tolist()
    assert [list(tokens.shape) for tokens in features.pooler_output] == [[count, 32] for count in counts]


def test_an_image_changes_the_logits_and_another_changes_them_differently(tiny, pixels):
    prompt = [["image", [5, 6, 7]]]
    first = text_logits(tiny, light_inputs(tiny, pixels[:1], prompt))[0][-1]
    second = text_logits(tiny, light_inputs(tiny, pixels[1:2], prompt))[0][-1]
    without = text_logits(tiny, make_prompts(tiny, [[[5, 6, 7]]]))[0][-1]
    for one, other in ((first, second), (first, without), (second, without)):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("make_inputs", [attached_inputs, light_inputs])
def test_a_batch_gives_what_its_rows_give_alone(tiny, pixels, make_inputs):
    batched = text_logits(tiny, make_inputs(tiny, pixels))
    images = [pixels[:1], pixels[1:3], pixels[:0]]
    for row, row_images, expected in zip(ROWS, images, batched, strict=True):
        inputs = make_prompts(tiny, [row])
        if len(row_images):
            inputs["pixel_values"] = row_images
        torch.testing.assert_close(text_logits(tiny, inputs)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(tiny, pixels, side):
    inputs = light_inputs(tiny, pixels[:1], [["image", [5, 6, 7]]])
    expected = text_logits(tiny, inputs)[0]
    width = (3, 0) if side == "left" else (0, 3)
    padded = {
        "input_ids": nn.functional.pad(inputs["input_ids"], width, value=2),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], width, value=0),
        "pixel_values": inputs["pixel_values"],
    }
    torch.testing.assert_close(text_logits(tiny, padded)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(tiny, pixels, implementation):
    eager = copy.deepcopy(tiny)
    eager.set_attn_implementation("eager")
    other = copy.deepcopy(tiny)
    other.set_attn_implementation(implementation)
    for make_inputs in (light_inputs, attached_inputs):
        inputs = make_inputs(tiny, pixels)
        for one, two in zip(text_logits(eager, inputs), text_logits(other, inputs), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_discrete_images_are_ordinary_ids(tiny, pixels):
    codes = tiny.visual_tokenizer.encode(pixels[:1]).codes
    ids = torch.cat([torch.tensor([tiny.config.boi_token_id]), codes + tiny.config.visual_token_offset])[None]
    text_model = tiny.model.language_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(tiny(input_ids=ids).logits, tiny.lm_head(text_model))


def test_loss_is_the_same_in_both_forms(tiny, pixels):
    losses = []
    for inputs in (attached_inputs(tiny, pixels), light_inputs(tiny, pixels)):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        losses.append(tiny(**inputs, labels=labels).loss)
    torch.testing.assert_close(*losses)


def test_images_without_any_token(tiny, pixels):
    model = copy.deepcopy(tiny)
    nn.init.constant_(model.visual_tokenizer.continuous.selector.out_proj_3.bias, 0)
    with torch.no_grad():
        model.visual_tokenizer.continuous.selector.out_proj_3.bias[1] = 100.0
    assert model.visual_tokenizer.embed(pixels).num_tokens.tolist() == [0] * NUM_IMAGES
    light = light_inputs(model, pixels)
    attached = {
        **make_prompts(model, ROWS, [0] * NUM_IMAGES),
        "image_features": model.visual_tokenizer.embed(pixels).features,
    }
    for one, other in zip(text_logits(model, light), text_logits(model, attached), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    labels = light["input_ids"].masked_fill(light["attention_mask"] == 0, -100)
    assert model(**light, labels=labels).loss.isfinite()
    new = [model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)[:, -4:] for inputs in (light, attached)]
    assert torch.equal(*new)


def test_gradients_reach_projection_and_merger(tiny, pixels):
    model = copy.deepcopy(tiny).train()
    inputs = light_inputs(model, pixels)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels).loss.backward()
    for parameter in (
        model.model.multi_modal_projector.weight,
        model.visual_tokenizer.continuous.merger.layers[0].mlp.fc1.weight,
        model.get_input_embeddings().weight,
    ):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("make_inputs", [attached_inputs, light_inputs])
def test_going_on_from_the_cache_by_hand(tiny, pixels, make_inputs):
    """Empty placeholders of the light form stay out of attention in later calls, whatever mask the caller passes."""
    inputs = make_inputs(tiny, pixels)
    new_ids = torch.tensor([[20, 21], [22, 23], [24, 25]])
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new_ids], dim=1)}
    mask = nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    with torch.no_grad():
        expected = tiny(**{**longer, "attention_mask": mask}).logits[:, -2:]
        cache = tiny(**inputs, use_cache=True)[CACHE_NAME]
        actual = tiny(input_ids=new_ids, attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("pixel_values"), "no images were given"),
        (lambda inputs: inputs.update(pixel_values=inputs["pixel_values"][:2]), "2 images"),
        (lambda inputs: inputs.update(image_features=torch.zeros(3, 32)), "once"),
        (lambda inputs: inputs.update(inputs_embeds=torch.zeros(3, 5, 32)), "exactly one of input_ids"),
        (lambda inputs: inputs.update(position_ids=torch.zeros_like(inputs["input_ids"])), "position_ids"),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(3, 3, 8, 8)), "image processor"),
        (lambda inputs: inputs.update(pixel_values=inputs["pixel_values"] * float("nan")), "not finite"),
        (lambda inputs: inputs.update(input_ids=inputs["input_ids"][:, 4:], attention_mask=None), "truncation"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny, pixels, change, message):
    inputs = light_inputs(tiny, pixels)
    change(inputs)
    with pytest.raises(ValueError, match=message):
        tiny(**inputs)


def test_negative_ids_are_refused(tiny):
    ids = torch.tensor([[5, 6], [7, -100]])
    for call in (tiny, tiny.generate):
        with pytest.raises(ValueError, match="input_ids hold -100"):
            call(ids)


def test_ids_behind_the_vocabulary_are_refused(tiny):
    for call in (tiny, tiny.generate):
        with pytest.raises(ValueError, match="input_ids hold 1000, but the last id of the vocabulary is 116"):
            call(torch.tensor([[5, 1000]]))


def test_empty_prompts_are_refused(tiny):
    for mode in ("text", "image", "interleaved"):
        with pytest.raises(ValueError, match="The prompt is empty"):
            tiny.generate(torch.empty(1, 0, dtype=torch.long), generation_mode=mode)


def test_text_needs_no_look_at_its_ids(tiny):
    """Looking at them would wait for a GPU, and break graphs; so shapes can be computed without values, too."""
    model = copy.deepcopy(tiny).to("meta")
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    assert model(ids, labels=ids).logits.shape == (2, 5, tiny.config.text_config.vocab_size)
    compiled = torch.compile(tiny, backend="eager", fullgraph=True)
    ids = torch.arange(5, 11).reshape(2, 3)
    assert torch.equal(compiled(ids, labels=ids, use_cache=False).loss, tiny(ids, labels=ids, use_cache=False).loss)


def test_wrong_number_of_handed_over_features_is_refused(tiny, pixels):
    inputs = attached_inputs(tiny, pixels)
    inputs["image_features"] = inputs["image_features"][:-1]
    with pytest.raises(ValueError, match="image_features has"):
        tiny(**inputs)
    with pytest.raises(ValueError, match="image_features has"):
        tiny.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gpt_neox", "phi", "gemma2"])
def test_any_decoder_can_be_the_language_model(model_type, pixels):
    overrides = {"head_dim": 8} if model_type == "gemma2" else {}
    model = build_model(model_type=model_type, **overrides)
    attached = text_logits(model, attached_inputs(model, pixels))
    light = text_logits(model, light_inputs(model, pixels))
    for one, other in zip(attached, light, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert model.generate(**light_inputs(model, pixels), max_new_tokens=2).shape[1] > 2


def test_tied_embeddings(tmp_path):
    config = lavit_config(tie_word_embeddings=True)
    model = LavitForConditionalGeneration(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = LavitForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_logits_to_keep(tiny, pixels):
    inputs = light_inputs(tiny, pixels)
    logits = tiny(**inputs).logits
    torch.testing.assert_close(tiny(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(tiny(**inputs, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


def test_save_and_load_is_lossless(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded, info = LavitForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, one), (_, other) in zip(tiny.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_num_patches_is_the_longest_image(tiny):
    assert tiny.config.visual_tokenizer_config.num_patches == NUM_PATCHES


def test_a_corrupt_shard_is_named(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(OSError, match=f"{shard.name} is not a readable safetensors file"):
        LavitForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["visual_tokenizer", "multi_modal_projector", "language_model"])
def test_offloading_to_disk(tiny, pixels, tmp_path, part):
    """Regression: features were moved to the device of the projection's weights, which is meta between calls."""
    tiny.save_pretrained(tmp_path)
    parts = ("visual_tokenizer", "multi_modal_projector", "language_model")
    device_map = {f"model.{name}": "disk" if name == part else "cpu" for name in parts} | {"lm_head": "cpu"}
    loaded = LavitForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    for inputs in (light_inputs(tiny, pixels), attached_inputs(tiny, pixels)):
        torch.testing.assert_close(loaded(**inputs).logits, tiny(**inputs).logits)


def test_offloading_a_model_in_half_precision(tiny, pixels):
    half = copy.deepcopy(tiny).to(torch.bfloat16)
    expected = half(**light_inputs(tiny, pixels)).logits
    torch.testing.assert_close(cpu_offload(half, torch.device("cpu"))(**light_inputs(tiny, pixels)).logits, expected)


def test_the_decoding_step_compiles_in_one_graph(tiny, pixels):
    inputs = attached_inputs(tiny, pixels)
    new_ids, mask = torch.tensor([[20], [21], [22]]), nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": new_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -1:]}
    logits = []
    with torch.no_grad():
        for forward in (tiny.forward, torch.compile(tiny.forward, fullgraph=True)):
            cache = StaticCache(config=tiny.config, max_cache_len=64)
            tiny(**inputs, cache=cache)
            logits.append(forward(**step, cache=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text"])
def test_sliding_windows_count_no_empty_placeholders(model_type, pixels):
    """Regression: empty placeholders used up the window."""
    overrides = {"head_dim": 8} if model_type.startswith("gemma") else {}
    model = build_model(model_type=model_type, sliding_window=8, **overrides)
    attached = text_logits(model, attached_inputs(model, pixels))
    light = text_logits(model, light_inputs(model, pixels))
    for one, other in zip(attached, light, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])
def test_logits_are_those_of_the_whole_language_model(model_type):
    """Regression: caps and scales that follow the head of some language models were lost."""
    overrides = {"gemma2": {"head_dim": 8}, "granite": {"logits_scaling": 4.0}}.get(model_type, {})
    model = build_model(model_type=model_type, **overrides)
    whole = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    whole.model, whole.lm_head = model.model.language_model, model.lm_head
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_loss_does_not_depend_on_the_side_of_the_padding(tiny, pixels):
    inputs = light_inputs(tiny, pixels)
    losses = []
    for side in ("left", "right"):
        rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        padded = {
            name: nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding, padding_side=side)
            for name, values, padding in (
                ("input_ids", rows, 2),
                ("attention_mask", [torch.ones_like(ids) for ids in rows], 0),
                ("labels", rows, -100),
            )
        }
        losses.append(tiny(**padded, pixel_values=pixels).loss)
    torch.testing.assert_close(*losses)


def test_in_training_every_position_sees_something(pixels, monkeypatch):
    """Regression: rows packed to the right began with positions that saw nothing, and cuDNN's gradient was NaN."""
    model = build_model()
    inputs = light_inputs(model, pixels)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    masks = []
    forward = model.model.language_model.forward

    def watch(*args, attention_mask, **kwargs):
        masks.append(attention_mask.clone())
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", watch)
    expected = model.eval()(**inputs, labels=labels, use_cache=False).loss
    loss = model.train()(**inputs, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    evaluated, trained = masks
    assert evaluated.shape == trained.shape and torch.equal(evaluated.sum(dim=1), trained.sum(dim=1))
    assert evaluated[:, -1].all() and not evaluated[:, 0].all()
    assert trained[:, 0].all() and (trained.diff(dim=1) <= 0).all()


def test_placeholders_counted_as_labels_are_reported(tiny, pixels, caplog):
    inputs = light_inputs(tiny, pixels)
    tiny(**inputs, labels=inputs["input_ids"], num_items_in_batch=torch.tensor(50))
    assert "num_items_in_batch" in caplog.text


def test_image_ends_counted_as_labels_are_reported(tiny, pixels, caplog, monkeypatch):
    """Regression: whoever did what the warning said still counted one label per image too many, without a word."""
    warned = []
    monkeypatch.setattr("lavit_hf.modeling.modeling_lavit.logger.warning_once", warned.append)
    inputs = light_inputs(tiny, pixels)
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == tiny.config.image_token_id, -100)
    count = {"num_items_in_batch": torch.tensor(50)}
    tiny(**inputs, labels=labels, **count)
    assert len(warned) == 1 and "ends of continuous images" in warned[0]
    after = torch.nn.functional.pad(ids == tiny.config.image_token_id, (1, 0))[:, :-1]
    first = inputs["attention_mask"].cumsum(dim=1) <= 1
    tiny(**inputs, labels=labels.masked_fill(after | first, -100), **count)
    assert len(warned) == 1


def test_a_mask_of_another_width_is_refused(tiny, pixels):
    """Regression: on a filled cache, the mask of the new ids alone hid them."""
    inputs = light_inputs(tiny, pixels)
    cache = getattr(tiny(**inputs, use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match="one value for every cached and every new position"):
        tiny(**inputs, **{CACHE_NAME: cache})


def test_a_part_of_the_vocabulary_is_for_forward_without_labels(tiny):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="leave vocab_slice out"):
        tiny(input_ids=ids, labels=ids, vocab_slice=(0, 20))
    with pytest.raises(ValueError, match="vocab_slice is for `forward`"):
        tiny.generate(input_ids=ids, vocab_slice=(0, 20))


def test_single_hidden_states_can_be_asked_for(tiny, pixels):
    """Regression: in the light form, the layers left out were taken for states."""

    def asked_for(run) -> list[int | None]:
        part, everything = run([0, -1]).hidden_states, run(True).hidden_states
        return [
            None if state is None else next(i for i, one in enumerate(everything) if torch.equal(state, one))
            for state in part
        ]

    ids, inputs = torch.tensor([[5, 6, 7]]), light_inputs(tiny, pixels)
    # Which ones [0, -1] gives differs from one version of transformers to another.
    expected = asked_for(lambda which: tiny.model.language_model(input_ids=ids, output_hidden_states=which))
    assert None in expected
    assert asked_for(lambda which: tiny(**inputs, output_hidden_states=which)) == expected


def test_the_visual_tokenizer_is_the_encoder_of_images(tiny):
    """Regression: generic code that asks for it, to freeze it for instance, got the whole model."""
    assert tiny.get_encoder("image") is tiny.visual_tokenizer
    assert tiny.config.vision_config is tiny.visual_tokenizer.config.vision_config
    assert "vision_config" not in tiny.config.to_dict()


@pytest.mark.parametrize("image_token_id", [0, 89, 116])
def test_placeholders_may_have_a_row_that_nothing_uses_or_the_id_of_old(image_token_id):
    config = tiny_models.lavit_config()
    config.image_token_id = image_token_id
    config.validate()


@pytest.mark.parametrize("image_token_id", [-1, 1, 2, 90, 91, 92, 115, 117])
def test_placeholders_may_not_take_an_id_in_use(image_token_id):
    config = tiny_models.lavit_config()
    config.image_token_id = image_token_id
    with pytest.raises(StrictDataclassClassValidationError, match=f"image_token_id .{image_token_id}. must be a row"):
        config.validate()


BUDGETS = [3, 1, NUM_PATCHES]


def budgeted_inputs(tiny, pixels, rows=ROWS, budgets=BUDGETS) -> dict[str, torch.Tensor]:
    """What a processor gives with `num_image_tokens`."""
    prompts = make_prompts(tiny, rows, list(budgets))
    return {**prompts, "pixel_values": pixels, "num_image_tokens": torch.tensor(budgets)}


def packed_inputs(tiny, pixels, rows=ROWS, budgets=BUDGETS) -> dict[str, torch.Tensor]:
    """The same images encoded before."""
    with torch.no_grad():
        features = tiny.visual_tokenizer.embed(pixels, num_tokens=budgets).features
    return {**make_prompts(tiny, rows, list(budgets)), "image_features": features}


@torch.no_grad()
def test_logits_are_those_of_the_kept_patches(tiny, pixels):
    inputs = budgeted_inputs(tiny, pixels)
    output, expected = tiny(**inputs), tiny(**packed_inputs(tiny, pixels))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    assert output.attention_mask is None  # nothing is packed
    image_features = tiny.get_image_features(pixels, num_image_tokens=BUDGETS)
    assert [len(tokens) for tokens in image_features.pooler_output] == BUDGETS
    assert image_features.keep_mask.sum(dim=-1).tolist() == BUDGETS


@torch.no_grad()
def test_rows_of_different_budgets_equal_single_rows(tiny, pixels):
    rows = [["image", [5, 6, 7]], ["image", [8, 9]], ["image", [10]]]
    inputs = budgeted_inputs(tiny, pixels, rows)
    logits = tiny(**inputs).logits
    for index, budget in enumerate(BUDGETS):
        alone = budgeted_inputs(tiny, pixels[index : index + 1], rows[index : index + 1], [budget])
        expected = tiny(**alone).logits[0]
        torch.testing.assert_close(logits[index, -len(expected) :], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_generation(tiny, pixels, options):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    ids = tiny.generate(**budgeted_inputs(tiny, pixels), **options)
    assert torch.equal(ids, tiny.generate(**packed_inputs(tiny, pixels), **options))


def test_one_token_per_patch_is_no_budget_by_chance(tiny, pixels):
    """As many placeholders as patches leave it to the selector, unless the budget says so."""
    decided = make_prompts(tiny, ROWS)
    kept_all = {**decided, "pixel_values": pixels, "num_image_tokens": torch.tensor([NUM_PATCHES] * 3)}
    with torch.no_grad():
        all_logits = tiny(**kept_all).logits
        some_logits = tiny(**decided, pixel_values=pixels).logits
    assert (all_logits[:, -1] - some_logits[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_prior_moves_tokens(tiny, pixels):
    prior = torch.zeros(3, NUM_PATCHES)
    prior[:, :4] = 50.0  # more than any score
    inputs = {**budgeted_inputs(tiny, pixels, budgets=[4, 4, 4]), "image_log_prior": prior}
    mask = torch.arange(NUM_PATCHES).expand(3, -1) < 4
    features = tiny.visual_tokenizer.embed(pixels, keep_mask=mask).features
    expected = {**make_prompts(tiny, ROWS, [4, 4, 4]), "image_features": features}
    torch.testing.assert_close(tiny(**inputs).logits, tiny(**expected).logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(tiny.generate(**inputs, **options), tiny.generate(**expected, **options))
    undecided = {**make_prompts(tiny, ROWS), "pixel_values": pixels, "image_log_prior": -prior}
    kept = tiny.get_image_features(pixels, log_prior=-prior).keep_mask
    assert not kept[:, :4].any() and kept.any()
    assert tiny(**undecided).image_hidden_states.shape[0] == int(kept.sum())


def test_adapters(pixels):
    tiny = build_model()
    inputs = budgeted_inputs(tiny, pixels)
    expected = tiny.generate(**inputs, max_new_tokens=4, do_sample=False)
    adapted = get_peft_model(tiny, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(adapted.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_image_tokens": torch.tensor([3, 2, NUM_PATCHES])}, "Each image needs as many placeholders"),
        ({"num_image_tokens": torch.tensor([3, 1])}, "2 numbers of tokens for 3 images"),
        ({"num_image_tokens": torch.tensor([3, 0, 1])}, f"1 to {NUM_PATCHES} tokens"),
        ({"pixel_values": None}, "say how to encode pixel_values"),
    ],
)
def test_budgets_that_do_not_fit(tiny, pixels, change, message):
    inputs = {**budgeted_inputs(tiny, pixels), **change}
    for call in (tiny, tiny.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


class TextDecoder(nn.Module):
    """Ids to logits; images are ids of codes."""

    def __init__(self):
        super().__init__()
        self.model = build_model()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.fixture(scope="module")
def decoder() -> TextDecoder:
    return TextDecoder().eval()


def example(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, TEXT_VOCAB + 26, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def test_exports_for_any_length(decoder):
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(decoder, example(9), dynamic_shapes=({1: length}, {1: length}))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*example(17)), decoder(*example(17)), atol=1e-5, rtol=0)


def test_compiles_without_graph_breaks(decoder):
    compiled = torch.compile(decoder, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for length in (9, 17):
            torch.testing.assert_close(compiled(*example(length)), decoder(*example(length)), atol=1e-5, rtol=0)
