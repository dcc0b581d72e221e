"""The pictures and the sizes of the recording, and a visual tokenizer that looks its codes up."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data" / "tiny-original"
IMAGES = [Image.open(DATA / "images" / f"{i}.png") for i in range(3)]
PATHS = [str(DATA / "images" / f"{i}.png") for i in range(3)]
GOLDEN = load_file(DATA / "golden.safetensors")
META = json.loads((DATA / "golden_meta.json").read_text())
V, K, N = 300, 64, 16
START, END, IMAGE = V, V + 1, V + 2 + K


@dataclass
class FakeOutput:
    codes: torch.Tensor | None
    num_tokens: torch.Tensor


class FakeVisualTokenizer(torch.nn.Module):
    """Gives the golden's images the golden's codes; remembers how many images it was given in each call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000))
        self.calls = []

    device = property(lambda self: self.weight.device)
    dtype = property(lambda self: self.weight.dtype)

    def counts(self, pixel_values, counts):
        known = GOLDEN["pixel_values"].to(pixel_values.dtype)
        matches = [(known - image).abs().flatten(1).amax(1).argmin().item() for image in pixel_values]
        return torch.tensor([counts[i] for i in matches]), matches

    def encode(self, pixel_values):
        self.calls.append(pixel_values.shape[0])
        assert pixel_values.dtype == self.dtype and not torch.is_grad_enabled()
        counts, matches = self.counts(pixel_values, META["disc_counts"])
        codes = GOLDEN["disc_code_ids"].split(META["disc_counts"])
        return FakeOutput(torch.cat([codes[i] for i in matches]), counts)


def image_ids(count: int) -> list[int]:
    return [START, *[IMAGE] * count, END]
