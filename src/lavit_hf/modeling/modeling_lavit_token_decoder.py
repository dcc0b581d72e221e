"""Token decoder: turns visual codes back into features and a U-Net's conditions (LaVIT paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_files import CheckedLoadingMixin
from .configuration_lavit import LavitTokenDecoderConfig
from .modeling_lavit_merger import LavitCrossAttention, LavitMLP, LavitSelfAttention, merge_heads, split_heads

# Added to attention logits at padding, as the original does.
_PADDING_BIAS = -10000.0


@dataclass
class LavitTokenDecoderOutput(ModelOutput):
    """What a token decoder makes of visual codes.

    Args:
        features: Reconstructed features of the vision encoder, `[batch, num_queries, output_size]`.
        condition: Cross-attention condition of the U-Net, `[batch, num_queries, sum of cross_attention_dims]`.
        pooled_condition: `[batch, pooled_size]`, or `None`.
        negative_condition: What guidance contrasts the condition with, of the same shape: the stored rows, then
            zeros. A negative pooled condition is all zeros.
        negative_attention_mask: True at the stored rows, `[batch, num_queries]`; `None` if there are none.
        hidden_states: States of the queries before the first layer and after each, `[batch, num_queries, hidden]`, if
            asked for by `output_hidden_states=True`.
    """

    features: torch.Tensor | None = None
    condition: torch.Tensor | None = None
    pooled_condition: torch.Tensor | None = None
    negative_condition: torch.Tensor | None = None
    negative_attention_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class LavitTokenDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: self-attention over the queries, cross-attention to the code sequence, MLP."""

    def __init__(self, config: LavitTokenDecoderConfig):
        super().__init__()
        width = config.hidden_size
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = LavitSelfAttention(width, config.num_heads)
        self.cross_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_attn = LavitCrossAttention(width, config.num_heads)
        self.mlp_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = LavitMLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, hidden: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: State of the queries, `[batch, num_queries, hidden]`.
            codes: Embedded code sequence, `[batch, codes, hidden]`.
            bias: Added to the cross-attention logits, `[batch, 1, 1, codes]`.
        """
        query, key, value = self.self_attn.project(self.self_attn_layer_norm(hidden))
        attended = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.self_attn.out_proj(merge_heads(attended))
        query, key, value = self.cross_attn.project(self.cross_attn_layer_norm(hidden), codes)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        hidden = hidden + self.cross_attn.out_proj(merge_heads(attended))
        return hidden + self.mlp(self.mlp_layer_norm(hidden))


class LavitAttentionPooler(nn.Module):
    """Pools features with one attention query, their mean, as CLIP's attention pooling does."""

    def __init__(self, config: LavitTokenDecoderConfig):
        super().__init__()
        width = config.output_size
        assert config.pooled_size is not None
        self.num_heads = config.num_heads
        self.position_embedding = nn.Parameter(torch.empty(config.num_queries + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, config.pooled_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[batch, num_queries, output_size]` -> `[batch, pooled_size]`."""
        features = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1) + self.position_embedding
        query = split_heads(self.q_proj(features[:, :1]), self.num_heads)
        key = split_heads(self.k_proj(features), self.num_heads)
        value = split_heads(self.v_proj(features), self.num_heads)
        return self.c_proj(merge_heads(F.scaled_dot_product_attention(query, key, value))[:, 0])


class LavitTokenDecoder(CheckedLoadingMixin, PreTrainedModel):
    """Decodes visual codes to the features they stand for, and to the conditions of a diffusion U-Net."""

    config: LavitTokenDecoderConfig
    config_class = LavitTokenDecoderConfig
    base_model_prefix = "token_decoder"
    main_input_name = "codes"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LavitTokenDecoderLayer", "LavitAttentionPooler"]
    _can_record_outputs = {"hidden_states": LavitTokenDecoderLayer}

    def __init__(self, config: LavitTokenDecoderConfig):
        super().__init__(config)
        width = config.hidden_size
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.proj_in = nn.Linear(config.codebook_dim, width)
        self.position_embedding = nn.Parameter(torch.empty(config.num_queries, width))
        self.query_embedding = nn.Parameter(torch.empty(config.num_queries, width))
        self.layers = nn.ModuleList([LavitTokenDecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.feature_head_in = nn.Linear(width, width)
        self.feature_head_out = nn.Linear(width, config.output_size)
        self.condition_projections = nn.ModuleList(
            [nn.Linear(config.output_size, size) for size in config.cross_attention_dims]
        )
        self.pooler = LavitAttentionPooler(config) if config.pooled_size is not None else None
        self.negative_condition: torch.Tensor | None  # a constant that travels with the weights, hence no parameter
        negative = torch.zeros(config.num_negative_tokens, sum(config.cross_attention_dims))
        self.register_buffer("negative_condition", negative if config.num_negative_tokens else None)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LavitTokenDecoder):
            init.trunc_normal_(module.position_embedding, std=std)
            init.trunc_normal_(module.query_embedding, std=std)
            if module.negative_condition is not None:
                init.zeros_(module.negative_condition)
        elif isinstance(module, LavitAttentionPooler):
            init.normal_(module.position_embedding, std=self.config.output_size**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.codebook

    def set_input_embeddings(self, value: Any) -> None:
        self.codebook = value

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, codes: torch.Tensor, num_tokens: torch.Tensor | list[int], **kwargs: Any
    ) -> LavitTokenDecoderOutput:
        """
        Args:
            codes: Codes of all images, one after another, `[total]`, in `[0, codebook_size)`.
            num_tokens: Codes per image, `[batch]`.

        Returns:
            [`LavitTokenDecoderOutput`].

        Raises:
            ValueError: If codes and counts do not fit together, or an image has more codes than positions.
        """
        sizes = num_tokens.tolist() if isinstance(num_tokens, torch.Tensor) else list(num_tokens)
        if sum(sizes) != len(codes) or max(sizes, default=0) > self.config.num_queries:
            raise ValueError(
                f"Got {len(codes)} codes for images with {sizes} tokens; they must add up, and an image has at most "
                f"{self.config.num_queries}."
            )
        features = self.decode(*self.embed(self.codebook(codes), sizes))
        condition = torch.cat([project(features) for project in self.condition_projections], dim=-1)
        negative, negative_mask = self._negative(condition)
        return LavitTokenDecoderOutput(
            features=features,
            condition=condition,
            pooled_condition=self.pooler(features) if self.pooler is not None else None,
            negative_condition=negative,
            negative_attention_mask=negative_mask,
        )

    def decode(self, sequence: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Reconstructs the vision encoder's features.

        Args:
            sequence: Embedded codes, `[batch, longest, hidden]`, see [`~LavitTokenDecoder.embed`].
            bias: Added to the logits of attending to them, `[batch, 1, 1, longest]`.

        Returns:
            `[batch, num_queries, output_size]`.
        """
        hidden = self.query_embedding.expand(len(sequence), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, sequence, bias)
        return self.feature_head_out(self.feature_head_in(self.norm(hidden)).tanh())

    def _negative(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The negative condition, `[batch, num_queries, width]` like `condition`, and the mask of its stored rows."""
        negative = torch.zeros_like(condition)
        if self.negative_condition is None:
            return negative, None
        stored = len(self.negative_condition)
        negative[:, :stored] = self.negative_condition.to(condition.dtype)
        is_stored = torch.arange(condition.shape[1], device=condition.device) < stored
        return negative, is_stored.expand(len(condition), -1)

    def embed(self, rows: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds codes by value and by rank in their sequence.

        Args:
            rows: Codebook rows of all images, one after another, `[total, codebook_dim]`, or what training has in
                their place.
            sizes: Codes per image.

        Returns:
            Sequences padded with zeros, `[batch, longest, hidden]`, and the bias of attending to them,
            `[batch, 1, 1, longest]`.
        """
        embedded = self.proj_in(rows).split(sizes)
        sequence = nn.utils.rnn.pad_sequence(list(embedded), batch_first=True)
        if sequence.shape[1] == 0:  # no image has a code
            sequence = F.pad(sequence, (0, 0, 0, 1))
        longest = sequence.shape[1]
        # An image without codes attends to the first position, in whatever company.
        counts = torch.tensor(sizes, device=sequence.device).clamp_min(1)
        is_padding = torch.arange(longest, device=sequence.device) >= counts[:, None]
        return sequence + self.position_embedding[:longest], is_padding[:, None, None, :] * _PADDING_BIAS


__all__ = ["LavitTokenDecoder", "LavitTokenDecoderOutput"]
