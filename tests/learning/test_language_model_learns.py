"""Stage 2 teaches a language model to say what is on pictures that it has not seen."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer
from transformers import TrainingArguments as Arguments

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitImageProcessorPil
from lavit_hf.data.scenes import CaptionError, Facts, make_scenes, parse_caption
from lavit_hf.training.dataset import EpochCallback, TrainingDataset
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from lavit_hf.training.language_model.generation_metrics import GenerationMetrics
from lavit_hf.training.language_model.preparation import freeze_for_language_modeling

IMAGE_SIZE, PATCH_SIZE, WIDTH, STEPS = 32, 8, 96, 500


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "</s>"]
    backend.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def build_model(text_vocab: int) -> LavitForConditionalGeneration:
    """Everything is new: even the vision encoder has random weights, which keep enough of what it sees."""
    torch.manual_seed(0)
    vision = AutoConfig.for_model(
        "vit",
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_range=0.1,
    )
    text = AutoConfig.for_model(
        "llama",
        vocab_size=text_vocab,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        vision_model=AutoModel.from_config(vision),
        text_model=AutoModelForCausalLM.from_config(text),
        codebook_size=64,
        codebook_dim=8,
        merger_num_layers=1,
    )
    with torch.no_grad():
        # A selector that nobody has trained drops patches, and whole images, at random.
        model.visual_tokenizer.continuous.selector.out_proj_3.bias[0] += 100
    return freeze_for_language_modeling(model)


def facts(caption: str) -> Facts | None:
    try:
        return parse_caption(caption)
    except CaptionError:
        return None


def agreement(found: list[Facts | None], truth: list[Facts]) -> dict[str, float]:
    """How many captions get something right."""
    parts: dict[str, Callable[[Facts], object]] = {
        "background": lambda fact: fact.background,
        "number": lambda fact: len(fact.objects),
        "colors": lambda fact: sorted(item.color for item in fact.objects),
    }
    return {
        name: sum(fact is not None and part(fact) == part(true) for fact, true in zip(found, truth, strict=True))
        / len(truth)
        for name, part in parts.items()
    }


def train_and_describe(output_dir: Path) -> dict[str, dict[str, float]]:
    """Agreement of what the model says about new scenes, and, for comparison, of the captions of others."""
    train = make_scenes("train", num_scenes=4000, image_size=IMAGE_SIZE)
    tokenizer = build_tokenizer(train["text"][:])
    model = build_model(len(tokenizer))
    image_processor = LavitImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor = ImageTextProcessor.from_vision_text_pretrained(
        config=model, tokenizer=tokenizer, image_processor=image_processor, visual_tokenizer=model
    )
    trainer = Trainer(
        model=model,
        args=Arguments(
            str(output_dir),
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=TrainingDataset(train),
        data_collator=LavitDataCollator(processor, image_first_probability=0.85),
        callbacks=[EpochCallback()],
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found: dict[str, dict[str, float]] = {"loss": {"first": history[0], "last": history[-1]}}

    def score(written: list[str], references: list[str]) -> dict[str, float]:
        truth = [parse_caption(text) for text in references]
        found["model"] = agreement([facts(text) for text in written], truth)
        others = truth.copy()
        random.Random(0).shuffle(others)
        found["chance"] = agreement(others, truth)
        return {}

    scenes = TrainingDataset(make_scenes("validation", num_scenes=200, image_size=IMAGE_SIZE))
    GenerationMetrics(model, processor, scenes, score, batch_size=100, max_new_tokens=40)()
    return found


def test_captions_of_new_scenes_are_right_far_above_chance(tmp_path):
    """One test: others would train once more where tests run in parallel."""
    results = train_and_describe(tmp_path)
    assert results["loss"]["last"] < results["loss"]["first"] / 3
    for part, least in (("background", 0.9), ("number", 0.6), ("colors", 0.45)):
        assert results["chance"][part] < least / 1.5, results
        assert results["model"][part] > least, results
