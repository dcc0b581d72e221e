"""LavitVisualTokenizerForPreTraining: what it computes, what it trains, and what it leaves alone."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from lavit_hf import LavitTokenDecoder, LavitVisualTokenizer
from lavit_hf.modeling.modeling_lavit_pretraining import (
    LavitVisualTokenizerForPreTraining,
    draw_noise,
    straight_through_keep,
)
from lavit_hf.modeling.modeling_lavit_visual_tokenizer import KEEP
from modeling.tiny_pretraining import (
    SCHEDULE,
    build_pretraining_model,
    names_with_gradient,
    pretraining_config,
    seeds,
    train_steps,
)
from tiny_models import CODEBOOK_SIZE, NUM_PATCHES, build_visual_tokenizer, random_pixels

DISCRETE = "visual_tokenizer.discrete."
DECODER_HEADS = ("token_decoder.codebook.", "token_decoder.condition_projections.", "token_decoder.pooler.")
# With these the phase is the same from the first step to the last.
LEARNING = {"bypass_merger_steps": 0, "selector_steps": None}
QUANTIZED = {"quantize_after_steps": 0, "kmeans_init": False}


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(8)


def expected_names(model, *parts: str) -> set[str]:
    """Parameters of the token decoder that reconstruct, and those below `parts` of the discrete branch."""
    prefixes = tuple(DISCRETE + part for part in parts)
    names = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    decoder = {name for name, _ in model.named_parameters() if name.startswith("token_decoder.")}
    return names | {name for name in decoder if not name.startswith(DECODER_HEADS)}


PROJECTIONS = ("quantizer.proj_in", "quantizer.proj_out")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("phase", "parts"),
    [
        ({"bypass_merger_steps": 9, "selector_steps": 9}, ("selector.", "merger.norm.")),
        (LEARNING, ("selector.", "merger.")),
        ({"bypass_merger_steps": 0, "selector_steps": 0}, ("merger.",)),
    ],
    ids=["bypass", "selector and merger", "merger"],
)
def test_gradients_reach_what_should_learn_and_nothing_else(pixels, phase, parts, quantized):
    schedule = {**phase, **(QUANTIZED if quantized else {})}
    # Projections at zero hide what lies before them from the first gradient.
    model = build_pretraining_model(zero_init_merger=False, visual={"share_branches": False}, **schedule)
    model(pixels, sample_seeds=seeds(8)).loss.backward()
    assert names_with_gradient(model) == expected_names(model, *parts, *PROJECTIONS)


def test_only_what_can_learn_requires_gradients(tmp_path):
    model = build_pretraining_model()
    model.save_pretrained(tmp_path)
    for one in (model, LavitVisualTokenizerForPreTraining.from_pretrained(tmp_path)):
        trainable = {name for name, value in one.named_parameters() if value.requires_grad}
        assert trainable == expected_names(one, "selector.", "merger.", *PROJECTIONS)


@pytest.mark.parametrize("smoothing", [0, 1e-6])
@pytest.mark.parametrize("schedule", [LEARNING, {"bypass_merger_steps": 0, "selector_steps": 0}])
def test_training_computes_what_inference_does_for_the_same_mask(pixels, smoothing, schedule):
    model = build_pretraining_model(
        visual={"attention_smoothing": smoothing}, zero_init_merger=False, **schedule, **QUANTIZED
    )
    model.quantizer_learner.config.ema_decay = 1 - 1e-12  # the codebook of before and after the step
    output = model(pixels, sample_seeds=seeds(8))
    assert 0 < output.keep_mask.float().mean() < 1
    with torch.no_grad():
        tokens = model.visual_tokenizer.encode(pixels, keep_mask=output.keep_mask)
        decoded = model.token_decoder(tokens.codes, tokens.num_tokens)
    assert torch.equal(tokens.codes, output.codes) and torch.equal(tokens.num_tokens, output.num_tokens)
    torch.testing.assert_close(output.features, decoded.features, atol=1e-5, rtol=1e-5)
    expected = 1 - F.cosine_similarity(decoded.features, tokens.patch_features, dim=-1).mean()
    torch.testing.assert_close(output.reconstruction_loss, expected, atol=1e-5, rtol=0)


def test_the_loss_is_the_sum_of_its_terms(pixels):
    model = build_pretraining_model(keep_rate_weight=3.0, commitment_weight=0.7, **LEARNING, **QUANTIZED)
    output = model(pixels, sample_seeds=seeds(8))
    expected = output.reconstruction_loss + 3 * output.keep_rate_loss + 0.7 * output.commitment_loss
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.keep_rate_loss, (1 / 3 - output.keep_mask.float().mean()).square())
    torch.testing.assert_close(output.cosine, 1 - output.reconstruction_loss)
    rate = output.keep_mask.float().mean(dim=-1)
    torch.testing.assert_close(output.keep_rate_spread, rate.std(correction=0))
    assert output.live_codes == len(output.codes.unique()) and 1 <= output.perplexity <= output.live_codes


def test_keep_rate_per_image(pixels):
    model = build_pretraining_model(keep_rate_per_image=True, **LEARNING)
    output = model(pixels, sample_seeds=seeds(8))
    expected = (1 / 3 - output.keep_mask.float().mean(dim=-1)).square().mean()
    torch.testing.assert_close(output.keep_rate_loss, expected)


def test_the_gradient_of_the_kept_count_is_that_of_the_softmax(pixels):
    """Straight through: by finite differences of the soft decision, in the bias that favors keeping."""
    model = build_pretraining_model(**LEARNING)
    selector = model.visual_tokenizer.discrete.selector
    features = model.visual_tokenizer.get_patch_features(pixels).detach()
    noise, _ = draw_noise(seeds(8), NUM_PATCHES)

    def soft_count() -> torch.Tensor:
        return (selector(features).double() + noise).softmax(dim=-1)[..., KEEP].sum()

    log_probs, keep, _ = model.selector_learner(selector, features, seeds(8), step=0)
    scores = log_probs + noise
    assert torch.equal(keep, (scores[..., KEEP] > scores[..., 1 - KEEP]).float()), "exactly 0 or 1"
    (gradient,) = torch.autograd.grad(keep.sum(), selector.out_proj_3.bias)
    bias, step = selector.out_proj_3.bias.data, 1e-2
    with torch.no_grad():
        bias[KEEP] += step
        above = soft_count()
        bias[KEEP] -= 2 * step
        difference = (above - soft_count()) / (2 * step)
    assert difference > 1
    torch.testing.assert_close(gradient[KEEP].double(), difference, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gradient[1 - KEEP], -gradient[KEEP])


def test_noise_belongs_to_the_image(pixels):
    model = build_pretraining_model(**LEARNING)
    state = torch.get_rng_state()
    masks = model(pixels, sample_seeds=seeds(8)).keep_mask
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(pixels[3:5], sample_seeds=seeds(8)[3:5]).keep_mask, masks[3:5])
    assert not torch.equal(model(pixels, sample_seeds=seeds(8, 50)).keep_mask, masks)


def test_noise_has_the_gumbel_distribution():
    noise = draw_noise(seeds(50), 400)[0].flatten()
    assert noise.isfinite().all()
    torch.testing.assert_close(noise.mean(), torch.tensor(0.5772), atol=0.02, rtol=0)  # Euler's constant
    torch.testing.assert_close(noise.std(), torch.tensor(torch.pi / 6**0.5), atol=0.02, rtol=0)


BUDGETS = {"keep_rate_range": (0.25, 1.0)}


@pytest.mark.parametrize("phase", [LEARNING, {"bypass_merger_steps": 9, "selector_steps": 9}, {"selector_steps": 0}])
def test_with_random_budgets_every_image_keeps_a_share_of_its_own(pixels, phase):
    model = build_pretraining_model(**BUDGETS, **phase)
    output = model(pixels, sample_seeds=seeds(8))
    _, uniform = draw_noise(seeds(8), NUM_PATCHES)
    shares = 0.25 + 0.75 * uniform
    assert output.num_tokens.tolist() == [max(round(share * NUM_PATCHES), 1) for share in shares.tolist()]
    assert len(set(output.num_tokens.tolist())) > 3
    again = build_pretraining_model(**BUDGETS, **phase)(pixels[2:4], sample_seeds=seeds(8)[2:4])
    assert torch.equal(again.keep_mask, output.keep_mask[2:4]), "whatever else is in the batch"


def test_a_budget_keeps_the_likeliest_patches_under_noise_and_without(pixels):
    for schedule in (LEARNING, {"selector_steps": 0}):
        model = build_pretraining_model(**BUDGETS, **schedule)
        output = model(pixels, sample_seeds=seeds(8))
        log_odds = output.selector_log_probs[..., KEEP] - output.selector_log_probs[..., 1 - KEEP]
        if schedule is LEARNING:
            noise, _ = draw_noise(seeds(8), NUM_PATCHES)
            log_odds = log_odds + noise[..., KEEP] - noise[..., 1 - KEEP]
        for row, mask in zip(log_odds, output.keep_mask, strict=True):
            assert mask.all() or row[mask].min() > row[~mask].max()


def test_with_random_budgets_the_rate_is_that_of_the_selector_itself(pixels):
    free = build_pretraining_model(**LEARNING)
    bound = build_pretraining_model(**BUDGETS, **LEARNING)
    one, other = free(pixels, sample_seeds=seeds(8)), bound(pixels, sample_seeds=seeds(8))
    assert torch.equal(one.keep_rate_loss, other.keep_rate_loss)
    assert one.keep_rate != other.keep_rate
    # Evaluation has no budgets.
    torch.testing.assert_close(free.eval()(pixels).loss, bound.eval()(pixels).loss)


def test_the_gradient_of_a_budget_is_that_of_a_softmax_shifted_to_it(pixels):
    log_probs = torch.randn(3, 6, 2).log_softmax(dim=-1).requires_grad_()
    keep = straight_through_keep(log_probs, None, 0.7, torch.tensor([1, 3, 6]))
    assert keep.sum(dim=-1).tolist() == [1, 3, 6] and set(keep.flatten().tolist()) <= {0.0, 1.0}
    (gradient,) = torch.autograd.grad(keep.sum(), log_probs)
    log_odds = (log_probs[..., KEEP] - log_probs[..., 1 - KEEP]).detach()
    ordered = log_odds.sort(descending=True).values
    threshold = torch.stack([ordered[0, :2].mean(), ordered[1, 2:4].mean(), ordered[2, 5]])
    soft = ((log_odds - threshold[:, None]) / 0.7).sigmoid()
    torch.testing.assert_close(gradient[..., KEEP], soft * (1 - soft) / 0.7)


@pytest.mark.parametrize("rates", [[0, 0.5], [0.5, 0.4], [0.5, 1.1], [0.5]])
def test_ranges_that_are_none_are_refused(rates):
    with pytest.raises(StrictDataclassError, match="two rates in order, above 0 and at most 1"):
        pretraining_config(keep_rate_range=rates)


def test_evaluation_decides_by_argmax_and_updates_nothing(pixels):
    model = build_pretraining_model(**LEARNING, **QUANTIZED)
    model(pixels, sample_seeds=seeds(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model.eval()(pixels)
    assert output.loss.isfinite() and output.codes is not None
    log_probs = output.selector_log_probs
    assert torch.equal(output.keep_mask, log_probs[..., KEEP] > log_probs[..., 1 - KEEP])
    assert torch.equal(output.keep_mask, model.visual_tokenizer.encode(pixels).keep_mask)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_frozen_encoder_stays_in_evaluation_mode():
    model = build_pretraining_model()
    assert model.training and model.visual_tokenizer.discrete.merger.training
    assert not any(module.training for module in model.visual_tokenizer.vision_model.modules())


@pytest.mark.parametrize("schedule", [{}, LEARNING, {"bypass_merger_steps": 0, "selector_steps": 0}])
@pytest.mark.parametrize("quantized", [False, True])
def test_images_without_a_token(pixels, schedule, quantized):
    model = build_pretraining_model(**schedule, **(QUANTIZED if quantized else {}))
    with torch.no_grad():
        model.visual_tokenizer.discrete.selector.out_proj_3.bias[KEEP] -= 1000
    output = model(pixels, sample_seeds=seeds(8))
    output.loss.backward()
    assert output.num_tokens.tolist() == [0] * 8 and output.loss.isfinite()
    assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())
    assert model.eval()(pixels).loss.isfinite()


@pytest.mark.parametrize("kept", [0, NUM_PATCHES])
def test_some_images_keep_all_or_nothing(pixels, kept):
    model = build_pretraining_model(zero_init_merger=False, **LEARNING)
    keep = torch.full((8, NUM_PATCHES), 0.0)
    keep[0, :kept], keep[1:, ::2] = 1, 1
    keep.requires_grad_()
    tokens = model._merge(model.visual_tokenizer.get_patch_features(pixels), keep, keep > 0)
    tokens.square().sum().backward()
    assert keep.grad.isfinite().all() and keep.grad[1:].all()


def test_phases_follow_one_another(pixels):
    model = build_pretraining_model(**SCHEDULE)
    phases = []
    for step in range(6):
        phases.append(model.phase)
        model(pixels[:6], sample_seeds=seeds(6, step))
    assert phases == ["bypass", "bypass", "continuous", "collecting", "collecting", "quantized"]
    assert int(model.step) == 6


def test_a_merger_at_its_start_changes_nothing(pixels):
    """So that the token decoder meets the merged tokens as it knows them from the bypass."""
    bypassed, merged = (build_pretraining_model(bypass_merger_steps=steps, selector_steps=0) for steps in (9, 0))
    torch.testing.assert_close(bypassed(pixels).features, merged(pixels).features, atol=1e-5, rtol=1e-5)


def test_calibration_lets_the_argmax_keep_the_wanted_share(pixels):
    model = build_pretraining_model(selector_steps=1, calibration_steps=3, keep_rate=0.25)
    bias = model.visual_tokenizer.discrete.selector.out_proj_3.bias
    with torch.no_grad():
        bias[KEEP] -= 6
        assert model.eval()(pixels).argmax_keep_rate == 0
    model.train()
    for step in range(4):
        model(pixels, sample_seeds=seeds(8, step)).loss.backward()
        assert (bias.grad is not None) == (step == 0), "what is measured does not move"
        bias.grad = None
    output = model(pixels)  # without seeds, because noise is over
    assert output.argmax_keep_rate == output.keep_rate == pytest.approx(0.25, abs=0.01)
    assert model.eval()(pixels).keep_rate == output.keep_rate
    shifted = bias.clone()
    model.train()(pixels)
    assert torch.equal(bias, shifted), "once"


def test_calibration_is_the_mean_over_its_steps():
    model = build_pretraining_model(selector_steps=1, calibration_steps=2, keep_rate=0.25)
    batches = [random_pixels(4, seed=seed) for seed in range(3)]
    expected = []
    for batch in batches:
        log_probs = model(batch, sample_seeds=seeds(4)).selector_log_probs
        expected.append((log_probs[..., KEEP] - log_probs[..., 1 - KEEP]).flatten().sort().values[47])
    torch.testing.assert_close(model.selector_learner.threshold, torch.stack(expected[1:]).mean())


def test_the_codebook_is_that_of_the_token_decoder(pixels):
    model = build_pretraining_model(**SCHEDULE)
    train_steps(model, pixels, 8)
    assert model.phase == "quantized"
    codebook = model.visual_tokenizer.discrete.quantizer.codebook.weight
    assert torch.equal(model.token_decoder.codebook.weight, codebook)
    torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(CODEBOOK_SIZE))


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_saved_model_goes_on_as_the_unsaved_one(pixels, tmp_path, steps):
    model = build_pretraining_model(**SCHEDULE, revive_every_steps=2, center_targets=True)
    train_steps(model, pixels, steps)
    model.save_pretrained(tmp_path)
    loaded = LavitVisualTokenizerForPreTraining.from_pretrained(tmp_path).train()
    assert loaded.config.to_dict().items() >= SCHEDULE.items()
    assert train_steps(loaded, pixels, 5) == train_steps(model, pixels, 5)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_both_parts_come_out_of_a_checkpoint(pixels, tmp_path):
    model = build_pretraining_model(**SCHEDULE)
    train_steps(model, pixels, 6)
    model.save_pretrained(tmp_path / "whole")
    model.visual_tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.token_decoder.save_pretrained(tmp_path / "decoder")
    for folders in (("whole", "whole"), ("tokenizer", "decoder")):
        tokenizer = LavitVisualTokenizer.from_pretrained(tmp_path / folders[0])
        decoder, info = LavitTokenDecoder.from_pretrained(tmp_path / folders[1], output_loading_info=True)
        assert not info["missing_keys"]
        tokens = tokenizer.encode(pixels)
        features = decoder(tokens.codes, tokens.num_tokens).features
        torch.testing.assert_close(features, model.eval()(pixels).features, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(pixels):
    gradients = []
    for checkpointing in (False, True):
        model = build_pretraining_model(zero_init_merger=False, **LEARNING, **QUANTIZED)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixels, sample_seeds=seeds(8)).loss.backward()
        assert int(model.step) == 1 and int(model.quantizer_learner.quantized_steps) == 1
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    torch.testing.assert_close(*gradients)


def test_centered_targets_take_out_what_every_image_has(pixels):
    """Otherwise a constant feature scores well; centered, it is worth nothing."""
    model = build_pretraining_model(center_targets=True, ema_decay=0.5, **LEARNING)
    targets = model.visual_tokenizer.get_patch_features(pixels).detach()
    model(pixels, sample_seeds=seeds(8))
    torch.testing.assert_close(model.mean_features, targets.mean(dim=0), atol=1e-5, rtol=1e-5)
    other = random_pixels(4, seed=5)
    model(other, sample_seeds=seeds(4))
    mean = (targets.mean(dim=0) + model.visual_tokenizer.get_patch_features(other).detach().mean(dim=0)) / 2
    torch.testing.assert_close(model.mean_features, mean, atol=1e-5, rtol=1e-5)
    model.eval()
    assert model._reconstruction_loss(model.mean_features.expand_as(targets), targets) == 1
    assert model._reconstruction_loss(targets, targets) == pytest.approx(0, abs=1e-5)


def test_other_images_can_be_the_targets(pixels):
    """Tokens are those of the images; what is made of them is compared with the targets."""
    model, targets = build_pretraining_model().eval(), random_pixels(8, seed=5)
    output, plain = model(pixels, target_pixel_values=targets), model(pixels)
    wanted = model.visual_tokenizer.get_patch_features(targets)
    assert torch.equal(output.features, plain.features) and torch.equal(output.patch_features, plain.patch_features)
    expected = 1 - F.cosine_similarity(output.features, wanted, dim=-1).mean()
    torch.testing.assert_close(output.reconstruction_loss, expected)
    assert abs(output.reconstruction_loss - plain.reconstruction_loss) > 1e-4
    torch.testing.assert_close(model(pixels, target_pixel_values=pixels).loss, plain.loss)
    with pytest.raises(ValueError, match="3 target images for 8 images"):
        model(pixels, target_pixel_values=targets[:3])


@pytest.mark.parametrize("given", [None, torch.arange(3)])
def test_training_without_seeds_is_refused(pixels, given):
    with pytest.raises(ValueError, match="VisualTokenizerDataCollator"):
        build_pretraining_model()(pixels, sample_seeds=given)


def test_nan_pixels_are_refused(pixels):
    with pytest.raises(ValueError, match="not finite"):
        build_pretraining_model()(pixels * float("nan"), sample_seeds=seeds(8))


@pytest.mark.parametrize(
    "values",
    [
        {"keep_rate": 0.0},
        {"keep_rate": 1.0},
        {"ema_decay": 1.5},
        {"gumbel_temperature": 0},
        {"kmeans_iterations": 0},
        {"selector_steps": -1},
        {"calibration_steps": -1},
        {"bypass_merger_steps": -1},
        {"revive_every_steps": -1},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(StrictDataclassError, match=next(iter(values))):
        pretraining_config(**values)


def test_a_token_decoder_that_does_not_fit_is_refused():
    config = pretraining_config()
    config.token_decoder_config.codebook_size = 7
    with pytest.raises(StrictDataclassError, match="codebook_size must be 24"):
        type(config)(
            visual_tokenizer_config=config.visual_tokenizer_config, token_decoder_config=config.token_decoder_config
        )


def test_the_token_decoder_is_sized_like_the_tokenizer():
    config = pretraining_config().token_decoder_config
    assert (config.codebook_size, config.codebook_dim, config.num_queries) == (CODEBOOK_SIZE, 6, NUM_PATCHES)
    assert (config.hidden_size, config.output_size, config.num_layers, config.num_heads) == (32, 32, 2, 2)
    assert config.cross_attention_dims == [8]


def test_a_new_tokenizer_around_a_vision_encoder(pixels, tmp_path):
    vision_model = build_visual_tokenizer().vision_model
    model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(
        vision_model=vision_model,
        visual_tokenizer_config={"codebook_size": 12, "merger_num_layers": 1},
        keep_rate=0.5,
    )
    config = model.config.visual_tokenizer_config
    assert (config.codebook_size, config.attention_smoothing, config.share_branches) == (12, 0, True)
    assert model.config.keep_rate == 0.5 and model.config.token_decoder_config.num_layers == 1
    expected = vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(model.visual_tokenizer.get_patch_features(pixels), expected)
    layer = model.visual_tokenizer.discrete.merger.layers[0]
    assert not layer.mlp.fc2.weight.any() and layer.mlp.fc1.weight.any()


def test_going_on_with_a_trained_tokenizer(pixels):
    trained = build_pretraining_model(zero_init_merger=False)
    trained._share_codebook()
    tokenizer, decoder = trained.visual_tokenizer.eval(), trained.token_decoder
    model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(vision_model=tokenizer, token_decoder=decoder)
    assert model.visual_tokenizer is not tokenizer
    output = model.train()(pixels)
    assert torch.equal(output.keep_mask, tokenizer.encode(pixels).keep_mask)
    assert model.phase == "quantized" and output.codes is not None
    state = model.token_decoder.state_dict()
    changed = {name for name, value in decoder.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {"codebook.weight"}
    with pytest.raises(ValueError, match="different codebooks"):
        LavitVisualTokenizerForPreTraining.from_vision_pretrained(
            vision_model=tokenizer, token_decoder=build_pretraining_model(1).token_decoder
        )
    with pytest.raises(ValueError, match="not to a new one"):
        LavitVisualTokenizerForPreTraining.from_vision_pretrained(
            vision_model=tokenizer.vision_model, token_decoder=decoder
        )


def test_half_precision_autocast(pixels):
    model = build_pretraining_model(**LEARNING, **QUANTIZED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels, sample_seeds=seeds(8))
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    assert model.quantizer_learner.sums.dtype == torch.float32


def test_half_precision_weights(pixels, tmp_path):
    model = build_pretraining_model(center_targets=True, **SCHEDULE)
    train_steps(model, pixels, 6)
    model.save_pretrained(tmp_path)
    half = LavitVisualTokenizerForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    kinds = {name: value.dtype for name, value in half.named_buffers()}
    assert kinds == {name: value.dtype for name, value in model.named_buffers()}, "averages stay in fp32"
    half(pixels).loss.backward()
    assert half.token_decoder.proj_in.weight.grad.dtype == torch.bfloat16
