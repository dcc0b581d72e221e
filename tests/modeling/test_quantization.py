"""What quantizers do to the model; those that run on a CPU are run.

These are no part of the `test` extra, as importing torchao slows every command:

pip install -c constraints.txt '.[quantization]'
"""

import copy

import pytest
import torch
from torch import nn
from transformers import TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from lavit_hf import LavitForConditionalGeneration
from tiny_models import attached_inputs, build_model, light_inputs, random_pixels

NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def tiny():
    return build_model()


@pytest.fixture(scope="module")
def int8(tiny, tmp_path_factory):
    """Weights in int8."""
    torchao = pytest.importorskip("torchao.quantization")
    folder = tmp_path_factory.mktemp("model")
    tiny.save_pretrained(folder)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    return LavitForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")


def is_quantized(parameter: torch.Tensor) -> bool:
    return type(parameter) is not torch.nn.Parameter


def test_int8_covers_everything_but_selectors_and_head(int8):
    names = {name for name, value in int8.named_parameters() if is_quantized(value)}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in names
    assert "model.visual_tokenizer.discrete.merger.layers.0.mlp.fc1.weight" in names
    assert not any("selector" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize("make_inputs", [attached_inputs, light_inputs])
def test_int8_logits_are_close(tiny, int8, make_inputs):
    inputs = make_inputs(tiny, random_pixels(3))
    if make_inputs is light_inputs:  # the same patches, although the encoder is quantized, too
        keep_masks = [model.visual_tokenizer.embed(inputs["pixel_values"]).keep_mask for model in (tiny, int8)]
        assert torch.equal(*keep_masks)
    with torch.no_grad():
        expected, actual = (model(**inputs).logits for model in (tiny, int8))
    assert 0 < (actual - expected).abs().max() < 0.1 * expected.abs().max()


def test_int8_generates_and_draws(int8):
    inputs = light_inputs(int8, random_pixels(3))
    assert torch.equal(int8.generate(**inputs, **NEW)[:, :-6], inputs["input_ids"])
    prompt = torch.tensor([[5, 6, int8.config.boi_token_id]])
    drawn = int8.generate(prompt, generation_mode="image", guidance_scale=2.0, **NEW)[0, 3:]
    assert ((drawn > int8.config.eoi_token_id) & (drawn < int8.config.image_token_id)).all()


def test_quantized_cache(tiny):
    pytest.importorskip("hqq")
    inputs = attached_inputs(tiny, random_pixels(3))
    options = {"backend": "hqq", "nbits": 8, "q_group_size": 8, "residual_length": 4}
    output = tiny.generate(**inputs, **NEW, cache_implementation="quantized", cache_config=options)
    assert torch.equal(output, tiny.generate(**inputs, **NEW))


class Int8Linear(nn.Module):
    """Weights in int8 with a scale per row, as bitsandbytes has them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight * self.scale, self.bias)


def test_selectors_stay_as_they_are():
    """Regression: they were quantized, and model and processor did not keep the same patches."""
    model = build_model()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for suffix in ("", ".weight"):  # bitsandbytes asks for modules, torchao for their parameters
        patterns = list(model._keep_in_fp32_modules)
        kept = {name for name in linears if not should_convert_module(name + suffix, patterns)}
        assert kept == {name for name in linears if "selector" in name} and len(kept) == 8


class Float8Linear(Int8Linear):
    """Weights in float8, as `FineGrainedFP8Config` has them."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.dtype == torch.float32
        return nn.functional.linear(hidden, self.weight.float(), self.bias)


class PackedLinear(Int8Linear):
    """Weights under another name, as GPTQ and AWQ have them."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.qweight = self.weight
        del self.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.qweight * self.scale, self.bias)


@pytest.mark.parametrize(("layer", "error"), [(Int8Linear, 0.05), (Float8Linear, 0.2), (PackedLinear, 0.05)])
def test_a_quantized_projection(layer, error):
    """Regression: features were rounded to the integers, or to the 8 bits, of its weights."""
    model, pixels = build_model(), random_pixels(3)
    inputs = attached_inputs(model, pixels)
    quantized = copy.deepcopy(model)
    quantized.model.multi_modal_projector = layer(model.model.multi_modal_projector)
    with torch.no_grad():
        expected, actual = (one(**inputs).logits for one in (model, quantized))
    assert 0 < (actual - expected).abs().max() < error * expected.abs().max()
