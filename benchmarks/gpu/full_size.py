"""A LaVIT of the published layout with random weights, made on the device itself, and a tiny one to try the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from timing import Floors, Timing, measure, measure_floors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from lavit_hf import (
    ImageTextProcessor,
    LavitConfig,
    LavitForConditionalGeneration,
    LavitImageProcessorPil,
    LavitPixelDecoderPipeline,
    LavitTextToImagePipeline,
    LavitTokenDecoder,
    LavitTokenDecoderConfig,
    LavitTokenizer,
)
from lavit_hf.training import build_pixel_decoder
from lavit_hf.training.planning import SDXL_UNET, SDXL_VAE


@dataclass
class Size:
    """What is built, and what is asked of it.

    Attributes:
        config: Of the language model and the visual tokenizer.
        token_decoder: Of the pixel decoder, as the two that follow.
        unet: See there.
        vae: See there.
        codes: Tokens of a picture that is read or drawn.
        steps: Denoising steps.
        side: Pixels of a drawn picture's side.
        prompt: Ids of a prompt.
        new_tokens: Of a text that is timed.
        caption_tokens: Of a caption.
        drawing_batches: Pictures whose codes are written at once.
        encoding_batches: Pictures that are encoded at once.
        reading_batch: Pictures that are captioned at once.
        painting_batch: Pictures that are drawn at once.
        lora_rows: Rows of a step of LoRA.
        lora_length: Ids of each.
        stage_1_batch: Pictures of a step of stage 1.
        stage_3_batch: Pictures of a step of stage 3.
        copied_bytes: What the copy bandwidth is measured with.
        product_side: Side of the matrices that the peak is measured with.
    """

    config: LavitConfig = field(default_factory=LavitConfig)  # by default the published layout
    token_decoder: LavitTokenDecoderConfig = field(default_factory=LavitTokenDecoderConfig)
    unet: dict[str, Any] = field(default_factory=lambda: dict(SDXL_UNET))
    vae: dict[str, Any] = field(default_factory=lambda: {**SDXL_VAE, "scaling_factor": 0.13025})
    codes: int = 94
    steps: int = 25
    side: int = 1024
    prompt: int = 16
    new_tokens: int = 128
    caption_tokens: int = 20
    drawing_batches: tuple[int, ...] = (1, 4, 16)
    encoding_batches: tuple[int, ...] = (1, 8, 64)
    reading_batch: int = 64
    painting_batch: int = 16
    lora_rows: int = 8
    lora_length: int = 512
    stage_1_batch: int = 64
    stage_3_batch: int = 8
    copied_bytes: int = 2**31
    product_side: int = 8192


def tiny() -> Size:
    """Everything small, so that a run takes seconds on a CPU."""
    config = LavitConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 300 + 2 + 64 + 1,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
        },
        visual_tokenizer_config={
            "vision_config": {
                "model_type": "blip_2_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            "merger_num_layers": 1,
            "merger_num_heads": 2,
            "merger_intermediate_size": 48,
            "codebook_size": 64,
            "codebook_dim": 8,
        },
        boi_token_id=300,
    )
    token_decoder = LavitTokenDecoderConfig(
        codebook_size=64,
        codebook_dim=8,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=48,
        num_queries=16,
        output_size=32,
        cross_attention_dims=[8, 16],
        pooled_size=16,
    )
    unet = {
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    }
    vae = {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    numbers = {"codes": 6, "steps": 2, "side": 16, "new_tokens": 4, "caption_tokens": 3, "reading_batch": 2}
    batches = {"drawing_batches": (1, 2), "encoding_batches": (1, 2), "painting_batch": 2}
    training = {"lora_rows": 2, "lora_length": 16, "stage_1_batch": 2, "stage_3_batch": 2}
    floors = {"copied_bytes": 2**20, "product_side": 128}
    return Size(config, token_decoder, unet, vae, **numbers, **batches, **training, **floors)


SIZES: dict[str, Callable[[], Size]] = {"7B": Size, "tiny": tiny}


@dataclass
class Bench:
    """What rows share. Parts are built when the first row asks for them.

    Attributes:
        size: What is built.
        device: Where.
        dtype: Of its weights.
        repeats: Calls that are measured.
        optimize: What pipelines compile of the U-Net: `"no"`, `"blocks"` or `"whole"`.
        quantization: What they compute its linear layers in; `None` is the dtype.
        scratch: Where something may be written, and removed again.
        child_command: The command of this program in another process, with more options.
    """

    size: Size
    device: torch.device
    dtype: torch.dtype
    repeats: int
    optimize: str
    quantization: str | None
    scratch: Path
    child_command: Callable[..., list[str]]

    def time(self, function: Callable[[], Any], **options: Any) -> Timing:
        return measure(function, self.device, self.repeats, **options)

    @cached_property
    def floors(self) -> Floors:
        return measure_floors(
            self.device, self.dtype, self.size.copied_bytes, self.size.product_side, max(self.repeats, 20)
        )

    @cached_property
    def model(self) -> LavitForConditionalGeneration:
        return build_model(self.size, self.device, self.dtype)

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The language model as transformers' own class, which shares the weights."""
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(self.size.config.text_config, dtype=self.dtype)
        plain.model, plain.lm_head = self.model.model.language_model, self.model.lm_head
        return plain.eval()

    @cached_property
    def pipeline(self) -> LavitTextToImagePipeline:
        """As it is loaded, until `optimize` changes it."""
        return build_pipeline(self.size, self.model)

    def prompts(self, batch_size: int) -> torch.Tensor:
        """Ids of text."""
        config = self.size.config
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, config.boi_token_id, (batch_size, self.size.prompt), generator=generator)
        return ids.to(self.device)

    def pixel_values(self, batch_size: int) -> torch.Tensor:
        height, width = self.size.config.visual_tokenizer_config.image_size
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch_size, 3, height, width, generator=generator).to(self.device, self.dtype)


def build_model(size: Size, device: torch.device, dtype: torch.dtype) -> LavitForConditionalGeneration:
    """Random weights on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(size.config, dtype=dtype).eval()
    for branch in (model.visual_tokenizer.discrete, model.visual_tokenizer.continuous):
        branch.selector.float()  # as it is when it is loaded
    return model


def build_pipeline(size: Size, model: LavitForConditionalGeneration) -> LavitTextToImagePipeline:
    """The model with a pixel decoder, which shares its codebook, and a processor, whose words are made up."""
    config, device, dtype = model.config, model.device, model.dtype
    pixel_decoder = build_bare_pixel_decoder(size, device)
    token_decoder = pixel_decoder.token_decoder
    token_decoder.codebook.weight.data.copy_(model.visual_tokenizer.discrete.quantizer.codebook.weight)
    components = {**pixel_decoder.components, "model": model, "processor": build_processor(config)}
    pipeline = LavitTextToImagePipeline(**components).to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_bare_pixel_decoder(size: Size, device: torch.device) -> LavitPixelDecoderPipeline:
    """Random weights in fp32."""
    with torch.device(device):
        return build_pixel_decoder(
            LavitTokenDecoder(size.token_decoder),
            AutoencoderKL.from_config(size.vae),
            size.unet,
            visual_token_offset=size.config.visual_token_offset,
            eoi_token_id=size.config.eoi_token_id,
        )


def build_processor(config: LavitConfig) -> ImageTextProcessor:
    """A byte-level tokenizer with as many ids of text as the model has."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused_{index}>" for index in range(config.boi_token_id - len(names))]
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    visual = config.visual_tokenizer_config
    tokenizer = LavitTokenizer.from_text_tokenizer(
        text_tokenizer, visual.codebook_size, image_token_id=config.image_token_id
    )
    height, width = visual.image_size
    image_processor = LavitImageProcessorPil(size={"height": height, "width": width})
    return ImageTextProcessor(image_processor, tokenizer, image_seq_length=visual.num_patches)


def optimize(pipeline: LavitTextToImagePipeline, compile: str, quantization: str | None, **options: Any) -> None:
    """Prepares a pipeline, in place, to draw many pictures faster."""
    if compile != "no":
        pipeline.optimize(compile=compile, quantization=quantization, **options)
