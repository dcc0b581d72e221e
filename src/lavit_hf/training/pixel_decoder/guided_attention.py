"""Guided attention: a new U-Net is shown where in its condition to look.

The token decoder gives one condition for each patch of the image, and a U-Net draws a place well once it looks at the
conditions of that place. Nothing tells it so: its convolutions know where they are only by the padding at the border,
and its cross-attention finds the place late. A term of the loss, as Tachibana et al. 2018 have it for speech
(https://arxiv.org/abs/1710.08969), makes that the first thing it learns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# How far from the middle of a place its conditions are, in sides of a patch: those that overlap it, and next to them.
_REACH = 1.2
_LEAST = 1e-6  # of attention, so that none at all has a gradient


class GuidedAttention:
    """Measures how much of a U-Net's cross-attention falls on the conditions of the place that looks.

    Half of the heads are measured, as the others may look for what the whole image is like, and of the layers those in
    the middle and on the way up: those on the way down do not see far enough to know where they are.

    Args:
        unet: A `UNet2DConditionModel`.
        num_conditions: Conditions of an image, one for each patch of a square grid.

    Raises:
        ValueError: If the conditions make no square grid, or the U-Net has no cross-attention there.
    """

    def __init__(self, unet: Any, num_conditions: int) -> None:
        self.side = round(num_conditions**0.5)
        if self.side**2 != num_conditions:
            raise ValueError(
                f"Guided attention needs a square grid of conditions; the token decoder has {num_conditions}."
            )
        self.layers: list[nn.Module] = [
            module
            for name, module in unet.named_modules()
            if name.startswith(("mid_block.", "up_blocks.")) and name.endswith(".attn2")
        ]
        if not self.layers:
            raise ValueError("Guided attention needs a U-Net with cross-attention in its middle or on its way up.")
        self._maps: list[torch.Tensor] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keeps the attention of what the U-Net does in this context, for [`~GuidedAttention.loss`]."""
        self._maps = []
        hooks = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """The attention probabilities of the guided heads, `[batch, heads, places, conditions]`."""
        hidden = inputs[0] if inputs else options["hidden_states"]
        query, key = layer.to_q(hidden), layer.to_k(options["encoder_hidden_states"])
        num_guided = max(layer.heads // 2, 1)
        query, key = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)[:, :num_guided] for x in (query, key))
        self._maps.append((layer.scale * query @ key.transpose(-1, -2)).float().softmax(dim=-1))

    def loss(self, height: int, width: int) -> torch.Tensor:
        """How surprising it is, by the attention that was kept, to look at conditions of one's own place.

        Args:
            height: Height of the U-Net's latents.
            width: Their width.

        Returns:
            Mean negative logarithm of that share of the attention, `[batch]`.
        """
        surprises = []
        for attention in self._maps:
            near = self._near(*_shrunk(height, width, attention.shape[2]), attention.device)
            share = (attention * near).sum(dim=-1)
            surprises.append(-(share + _LEAST).log().mean(dim=(1, 2)))
        self._maps = []
        return torch.stack(surprises).mean(dim=0)

    def _near(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Which conditions belong to which place, boolean `[height * width, conditions]`."""
        rows = (torch.arange(height, device=device) + 0.5) * self.side / height
        columns = (torch.arange(width, device=device) + 0.5) * self.side / width
        middles = torch.arange(self.side, device=device) + 0.5
        row_distances = (rows[:, None] - middles).square()[:, None, :, None]
        column_distances = (columns[:, None] - middles).square()[None, :, None, :]
        distances = (row_distances + column_distances).sqrt()
        return (distances < _REACH).reshape(height * width, self.side**2)


def _shrunk(height: int, width: int, num_places: int) -> tuple[int, int]:
    """Height and width of the level of a U-Net that has that many places."""
    while height * width > num_places:
        height, width = (height + 1) // 2, (width + 1) // 2  # as a convolution of stride 2 with padding shrinks them
    return height, width
