"""What quantizers do to the model; `test_quantization` runs real ones, where they are installed."""

import copy

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from tiny_models import attached_inputs, build_model, random_pixels


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


def test_a_quantized_projection():
    """Regression: features were rounded to the integers of its weights."""
    model, pixels = build_model(), random_pixels(3)
    inputs = attached_inputs(model, pixels)
    quantized = copy.deepcopy(model)
    quantized.model.multi_modal_projector = Int8Linear(model.model.multi_modal_projector)
    with torch.no_grad():
        expected, actual = (one(**inputs).logits for one in (model, quantized))
    assert 0 < (actual - expected).abs().max() < 0.05 * expected.abs().max()
