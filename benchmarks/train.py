"""How fast stage 2 trains on scenes: packing against padding, tokenized images against images encoded on the way.

    python benchmarks/train.py [--rows 256] [--batch 32] [--repeats 3]

All variants train the same small model (random weights, Llama of width 256 with 4 layers) on the same scenes, taking
turns. Compared are real tokens per second, padding not counted, from rows to the optimizer's step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lavit_hf import (
    ImageTextProcessor,
    LavitConfig,
    LavitForConditionalGeneration,
    LavitImageProcessorPil,
    LavitTokenizer,
)
from lavit_hf.data.scenes import make_scenes
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from lavit_hf.training.language_model.preparation import freeze_for_language_modeling

IMAGE_SIZE, PATCH_SIZE, CODES = 64, 8, 1024


@dataclass
class Variant:
    """A way to train.

    Attributes:
        samples: What is trained on.
        collator: What makes batches of it.
        use_cache: Passed to the model.
        seconds: The best time so far.
        num_tokens: Real tokens of all samples.
        num_positions: Positions that the language model computes for them.
    """

    samples: Sequence[dict[str, Any]]
    collator: LavitDataCollator
    use_cache: bool = False
    seconds: float = float("inf")
    num_tokens: int = 0
    num_positions: int = 0

    @property
    def speed(self) -> float:
        return self.num_tokens / self.seconds


def build_tokenizer(texts: list[str]) -> LavitTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return LavitTokenizer.from_text_tokenizer(text_tokenizer, CODES)


def build_model(tokenizer: LavitTokenizer) -> LavitForConditionalGeneration:
    torch.manual_seed(0)
    config = LavitConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        visual_tokenizer_config={
            "vision_config": {
                "model_type": "blip_2_vision_model",
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
            },
            "merger_num_layers": 2,
            "merger_num_heads": 4,
            "merger_intermediate_size": 512,
            "codebook_size": CODES,
            "codebook_dim": 16,
            "attention_smoothing": 0.0,
        },
    )
    return freeze_for_language_modeling(LavitForConditionalGeneration(config))


@torch.no_grad()
def keep_a_third(model: LavitForConditionalGeneration, pixel_values: torch.Tensor) -> None:
    """Has untrained selectors keep as many patches as trained ones would: one in three, over all images."""
    features = model.visual_tokenizer.get_patch_features(pixel_values)
    for branch in (model.visual_tokenizer.discrete, model.visual_tokenizer.continuous):
        log_probs = branch.selector(features)
        branch.selector.out_proj_3.bias[0] -= (log_probs[..., 0] - log_probs[..., 1]).quantile(2 / 3)


def tokenize(samples: list[dict[str, Any]], processor: ImageTextProcessor) -> list[dict[str, Any]]:
    """The samples with codes instead of images, as `lavit tokenize` stores them."""
    ids = processor.tokenize_images([image for sample in samples for image in sample["images"]])
    codes = iter([processor.tokenizer.convert_ids_to_codes(row[1:-1]).tolist() for row in ids])
    return [
        {
            **{name: value for name, value in sample.items() if name != "images"},
            "codes": [next(codes) for _ in sample["images"]],
        }
        for sample in samples
    ]


def run(variant: Variant, model: LavitForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: int) -> None:
    """Trains on all samples once, and takes the time."""
    positions = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    start = time.perf_counter()
    for first in range(0, len(variant.samples), batch):
        inputs = variant.collator(variant.samples[first : first + batch])
        model(**{"use_cache": variant.use_cache, **inputs}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    variant.seconds = min(variant.seconds, time.perf_counter() - start)
    variant.num_positions = sum(positions)
    hook.remove()


def count_tokens(variant: Variant, model: LavitForConditionalGeneration) -> int:
    """Tokens that the language model needs to see, without padding and without the placeholders of dropped patches."""
    inputs = LavitDataCollator(
        variant.collator.processor, image_first_probability=variant.collator.image_first_probability
    )(variant.samples)
    count = int(inputs["attention_mask"].sum())
    if "pixel_values" in inputs:
        with torch.no_grad():
            kept = model.visual_tokenizer.embed(inputs["pixel_values"]).num_tokens.sum()
        count += int(kept) - int((inputs["input_ids"] == model.config.image_token_id).sum())
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="scenes per round")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--max-length", type=int, default=128, help="longest packed sequence")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    scenes = make_scenes("train", num_scenes=arguments.rows, image_size=IMAGE_SIZE)
    tokenizer = build_tokenizer(scenes["text"][:])
    model = build_model(tokenizer)
    image_processor = LavitImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    length = model.config.visual_tokenizer_config.num_patches
    processor = ImageTextProcessor(image_processor, tokenizer, image_seq_length=length, visual_tokenizer=model)
    dataset = TrainingDataset(scenes)
    samples = [dataset[index] for index in range(len(dataset))]
    keep_a_third(model, image_processor([sample["images"][0] for sample in samples], return_tensors="pt").pixel_values)
    tokenized = tokenize(samples, processor)
    model.train()

    def collator(probability: float = 0.0, **options: Any) -> LavitDataCollator:
        return LavitDataCollator(processor, image_first_probability=probability, condition_dropout=0.0, **options)

    packed = {"packing": True, "max_length": arguments.max_length}
    variants = {
        "codes, padding": Variant(tokenized, collator()),
        "codes, packing": Variant(tokenized, collator(**packed)),
        "images encoded on the way, padding": Variant(samples, collator()),
        "features, padding": Variant(samples, collator(1.0)),
        "features, padding, empty placeholders computed": Variant(samples, collator(1.0), use_cache=True),
    }
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-5)
    for repeat in range(arguments.repeats + 1):
        for variant in variants.values():
            run(variant, model, optimizer, arguments.batch)
            if repeat == 0:  # The first round warms up.
                variant.seconds, variant.num_tokens = float("inf"), count_tokens(variant, model)
    print(f"{arguments.rows} scenes, batches of {arguments.batch}, {torch.get_num_threads()} threads")
    for name, variant in variants.items():
        share = variant.num_tokens / variant.num_positions
        print(f"{name}: {variant.speed:.0f} tokens/s ({share:.0%} of the positions are real tokens)")
    for better, worse in (
        ("codes, packing", "codes, padding"),
        ("codes, padding", "images encoded on the way, padding"),
        ("features, padding", "features, padding, empty placeholders computed"),
    ):
        print(f"{better} / {worse}: {variants[better].speed / variants[worse].speed:.2f}x")


if __name__ == "__main__":
    main()
