"""Linear layers whose weights are split over the cores."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lavit_hf.modeling import split_linear as module
from lavit_hf.modeling.split_linear import SplitLinears, split_linear


@pytest.fixture(params=[2, 3])
def threads(request, monkeypatch):
    """As if the machine had so many cores, and small weights were worth it."""
    monkeypatch.setattr(module, "_FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


@pytest.fixture
def products(monkeypatch) -> list:
    """Batched products made so far."""
    made = []
    bmm = torch.bmm
    monkeypatch.setattr(module.torch, "bmm", lambda *operands: made.append(operands) or bmm(*operands))
    return made


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (3,), (16,), (2, 8)])
@pytest.mark.parametrize("out", [12, 13, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_the_same_product(threads, products, shape, out, has_bias):
    hidden, weight = torch.randn(*shape, 7), torch.randn(out, 7)
    bias = torch.randn(out) if has_bias else None
    torch.testing.assert_close(split_linear(hidden, weight, bias), F.linear(hidden, weight, bias))
    assert len(products) == 1


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 7), torch.float32), ((17, 7), torch.float32), ((2, 7), torch.bfloat16)]
)
def test_other_products_are_left_to_torch(threads, products, shape, dtype):
    hidden, weight = torch.randn(shape, dtype=dtype), torch.randn(6, 7, dtype=dtype)
    assert torch.equal(split_linear(hidden, weight), F.linear(hidden, weight))
    assert not products


def test_small_weights_are_not_split(monkeypatch, products):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    split_linear(torch.randn(2, 512), torch.randn(511, 512))
    assert not products
    split_linear(torch.randn(2, 512), torch.randn(512, 512))
    assert len(products) == 1


def test_one_core_has_nothing_to_split(monkeypatch, products):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    split_linear(torch.randn(2, 7), torch.randn(6, 7))
    assert not products


class Adapted(nn.Linear):
    """Another class of linear layer."""


def test_a_model_is_as_before_afterwards(threads, products):
    model = nn.ModuleList([nn.Linear(7, 6), Adapted(7, 6), nn.Linear(7, 6)])
    model[2].forward = lambda hidden: "replaced"
    hidden = torch.randn(2, 7)
    with torch.no_grad():
        expected = model[0](hidden)
        with SplitLinears(model):
            torch.testing.assert_close(model[0](hidden), expected)
            assert len(products) == 1
            model[1](hidden)
            assert model[2](hidden) == "replaced"
        with pytest.raises(RuntimeError), SplitLinears(model):
            model[0](torch.randn(2, 5))  # an error within
        made = len(products)
        assert torch.equal(model[0](hidden), expected)
    assert len(products) == made
    assert "forward" not in vars(model[0])
    assert model[2](hidden) == "replaced"


def test_drawing_uses_it(threads, products, model, processor):
    inputs = processor(text=["a red bird"], generation_mode="image", return_tensors="pt")
    options = {"generation_mode": "image", "max_new_tokens": 6, "min_new_tokens": 6}
    alone = model.generate(**inputs, **options)  # one row, nothing to split
    assert not products
    guided = model.generate(**inputs, guidance_scale=3.0, **options)
    assert products
    assert alone.shape == guided.shape
    assert all("forward" not in vars(part) for part in model.modules())
