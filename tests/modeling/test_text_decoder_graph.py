"""The text decoder as one graph: `torch.export` and `torch.compile` without breaks."""

import pytest
import torch
from torch import nn

from tiny_models import TEXT_VOCAB, build_model


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
