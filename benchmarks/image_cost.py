"""Tokens and language model FLOPs to draw one image, by arithmetic: prints the table of the README.

    python benchmarks/image_cost.py [--tokens 100]

Every token costs two FLOPs per weight that it is multiplied with (layers, and the rows of the output head that are
computed), and `4 * width * context` per layer for attention; guidance doubles both. Prompts, norms and the pixel
decoder are left out. The others' token counts are fixed by their image size. LaVIT's is the number of patches kept,
which depends on the picture; 100 of 256 is taken here. Sizes are those of the published configurations:
rain1011/LaVIT-7B-v2, deepseek-community/Janus-Pro-7B, facebook/chameleon-7b, BAAI/Emu3-Gen-hf.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Drawer:
    """A model that writes images.

    Args:
        name: What to call it.
        tokens: Tokens per image.
        pixels: Side of that image.
        layers: Decoder layers.
        width: Hidden width.
        key_value_width: Width of all key (or value) heads together.
        mlp_width: Hidden width of the gated MLPs.
        head_rows: Rows of the output head computed per token.
        rows: Rows in the batch per image: 2 with guidance.
        note: What else to know.
    """

    name: str
    tokens: int
    pixels: int
    layers: int
    width: int
    key_value_width: int
    mlp_width: int
    head_rows: int
    rows: int
    note: str = ""

    @property
    def weights(self) -> int:
        """Weights that a token is multiplied with."""
        attention = 2 * self.width**2 + 2 * self.width * self.key_value_width
        return self.layers * (attention + 3 * self.width * self.mlp_width) + self.width * self.head_rows

    @property
    def flops(self) -> int:
        """FLOPs of one image."""
        contexts = self.tokens * (self.tokens + 1) // 2  # every token sees itself and those before it
        return self.rows * (2 * self.weights * self.tokens + 4 * self.layers * self.width * contexts)


def drawers(tokens: int) -> list[Drawer]:
    return [
        Drawer("LaVIT 7B, here", tokens, 1024, 32, 4096, 4096, 11008, 16385, 2, "ends by itself"),
        Drawer("Janus-Pro 7B", 576, 384, 30, 4096, 4096, 11008, 16384, 2, "fixed loop"),
        Drawer("Chameleon 7B", 1024, 512, 32, 4096, 4096, 11008, 65536, 1, "cannot draw in transformers"),
        Drawer("Emu3-Gen 8B", 4096, 512, 32, 4096, 1024, 14336, 184622, 2, "guidance unbatched"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100, help="tokens that LaVIT keeps of an image")
    models = drawers(parser.parse_args().tokens)
    print("| Model | Tokens per image | Image | TFLOPs of the language model | Ratio | How it draws |")
    print("|---|--:|--:|--:|--:|---|")
    for model in models:
        cost, ratio = model.flops / 1e12, model.flops / models[0].flops
        print(f"| {model.name} | {model.tokens} | {model.pixels}² | {cost:.1f} | {ratio:.1f} | {model.note} |")


if __name__ == "__main__":
    main()
