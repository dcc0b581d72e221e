import pytest
import torch
from torch.nn import functional as F

import tiny_models
from lavit_hf.training.language_model.preparation import init_code_embeddings, init_merger, init_projector


def code_rows(model, weight) -> torch.Tensor:
    offset = model.config.visual_token_offset
    return weight[offset : offset + tiny_models.CODEBOOK_SIZE].detach()


def similarities(rows: torch.Tensor) -> torch.Tensor:
    rows = F.normalize(rows - rows.mean(dim=0), dim=-1)
    return rows @ rows.T


@pytest.mark.parametrize("tied", [False, True])
def test_codes_that_are_alike_start_alike(tied):
    model = tiny_models.build_model(tie_word_embeddings=tied)
    offset = model.config.visual_token_offset
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [weight.detach().clone() for weight in tables]
    init_code_embeddings(model)
    codebook = F.normalize(model.visual_tokenizer.discrete.quantizer.codebook.weight.detach(), dim=-1)
    for weight, old in zip(tables, before, strict=True):
        rows, text = code_rows(model, weight), weight[:offset].detach()
        torch.testing.assert_close(similarities(rows), similarities(codebook), atol=1e-4, rtol=0)
        torch.testing.assert_close(rows.mean(dim=0), text.mean(dim=0), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.var(dim=0, correction=0).sum(), text.var(dim=0, correction=0).sum())
        torch.testing.assert_close(text, old[:offset], atol=0, rtol=0)
    assert torch.equal(*tables) == tied


def test_narrow_embeddings_cannot_hold_the_codebook():
    model = tiny_models.build_model(visual={"codebook_dim": 40})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="width 32 cannot hold a codebook of 40"):
        init_code_embeddings(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_new_merger_passes_kept_patches_on():
    model = tiny_models.build_model().eval()
    pixels = tiny_models.random_pixels(5)
    codes = model.visual_tokenizer.encode(pixels).codes
    init_merger(model)
    output = model.visual_tokenizer.embed(pixels)
    kept = output.patch_features[output.keep_mask]
    torch.testing.assert_close(output.features, F.layer_norm(kept, kept.shape[-1:], eps=1e-6), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.visual_tokenizer.encode(pixels).codes, codes), "what is drawn has a merger of its own"


def test_a_new_merger_learns():
    model = tiny_models.build_model()
    init_merger(model)
    model.visual_tokenizer.embed(tiny_models.random_pixels(5)).features.square().mul(torch.arange(32)).sum().backward()
    merger = model.visual_tokenizer.continuous.merger
    assert all(layer.mlp.fc2.weight.grad.abs().sum() > 0 for layer in merger.layers)


def test_a_merger_that_codes_come_from_does_not_start_anew():
    model = tiny_models.build_model(visual={"share_branches": True})
    with pytest.raises(ValueError, match="share_branches=True"):
        init_merger(model)


@pytest.mark.parametrize("hidden_size", [48, 32])
def test_projected_features_are_rotated(hidden_size):
    model = tiny_models.build_model(hidden_size=hidden_size, head_dim=8)
    pixels = tiny_models.random_pixels(20)
    init_projector(model, pixels, scale=0.5)
    with torch.no_grad():
        features = model.visual_tokenizer.embed(pixels).features
        projected = torch.cat(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(projected.mean(dim=0), torch.zeros(hidden_size), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected.square().mean().sqrt(), torch.tensor(0.5), atol=1e-5, rtol=0)
    distances, before = (torch.cdist(rows.double(), rows.double()).float() for rows in (projected, features))
    ratio = (
        projected.norm(dim=-1).square().mean().sqrt() / (features - features.mean(0)).square().sum(-1).mean().sqrt()
    )
    torch.testing.assert_close(distances, before * ratio, atol=1e-3, rtol=1e-3)


def test_narrow_language_models_keep_part_of_it():
    model = tiny_models.build_model(hidden_size=16, head_dim=8)
    init_projector(model, tiny_models.random_pixels(20))
    weight = model.model.multi_modal_projector.weight.detach()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(16) * gram[0, 0], atol=1e-4, rtol=0)


def test_centering_takes_tokens():
    model = tiny_models.build_model()
    with torch.no_grad():
        model.visual_tokenizer.continuous.selector.out_proj_3.bias[0] -= 100  # keeps nothing
    before = model.model.multi_modal_projector.weight.detach().clone()
    with pytest.raises(ValueError, match="2 images have 0 tokens: pass more images"):
        init_projector(model, tiny_models.random_pixels(2))
    assert torch.equal(model.model.multi_modal_projector.weight, before)
