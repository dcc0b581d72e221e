"""LavitTokenDecoder on a tiny random model; its reference numbers are in test_reference_modeling.py."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from lavit_hf import LavitTokenDecoder, LavitTokenDecoderConfig


@pytest.fixture(scope="module")
def decoder() -> LavitTokenDecoder:
    torch.manual_seed(0)
    config = LavitTokenDecoderConfig(
        codebook_size=10,
        codebook_dim=4,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        num_queries=6,
        output_size=16,
        cross_attention_dims=[8, 12],
        pooled_size=12,
        initializer_range=0.2,
    )
    return LavitTokenDecoder(config).eval()


CODES = torch.tensor([1, 2, 3, 4, 5])


def test_shapes(decoder):
    output = decoder(CODES, torch.tensor([3, 2]))
    assert output.features.shape == (2, 6, 16)
    assert output.condition.shape == (2, 6, 20)
    assert output.pooled_condition.shape == (2, 12)


def test_heads_that_do_not_divide_the_features_are_refused_at_once():
    """Regression: stage 1 trained a token decoder that stage 3 could not run."""
    sizes = {"hidden_size": 24, "num_heads": 3, "output_size": 16}
    with pytest.raises(StrictDataclassClassValidationError, match="needs output_size"):
        LavitTokenDecoderConfig(**sizes, pooled_size=12)
    LavitTokenDecoderConfig(**sizes, pooled_size=None)


def test_a_batch_gives_what_its_samples_give_alone(decoder):
    batched = decoder(CODES, [3, 2]).condition
    torch.testing.assert_close(decoder(CODES[:3], [3]).condition, batched[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder(CODES[3:], [2]).condition, batched[1:], atol=1e-5, rtol=0)


def test_codes_change_the_condition(decoder):
    one, other = decoder(CODES[:3], [3]).condition, decoder(CODES[1:4], [3]).condition
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("counts", [[0, 5], [0]])
def test_samples_without_codes(decoder, counts):
    output = decoder(CODES[: sum(counts)], counts)
    assert output.condition.isfinite().all() and len(output.condition) == len(counts)
    # Regression: beside others it attended to all of its padding, and alone to the first position.
    torch.testing.assert_close(output.condition[:1], decoder(CODES[:0], [0]).condition, atol=1e-5, rtol=0)


@pytest.mark.parametrize("counts", [[3], [3, 3], [7]])
def test_counts_that_do_not_fit_are_refused(decoder, counts):
    with pytest.raises(ValueError, match="must add up"):
        decoder(torch.zeros(5 if counts != [7] else 7, dtype=torch.long), counts)


def test_save_and_load_is_lossless(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    loaded = LavitTokenDecoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(CODES, [5]).condition, decoder(CODES, [5]).condition, atol=0, rtol=0)
