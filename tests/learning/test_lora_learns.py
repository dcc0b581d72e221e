"""LoRA teaches a frozen model that describes scenes to say the same in another style."""

import re
from collections.abc import Callable

import datasets
import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitImageProcessorPil
from lavit_hf.data.scenes import COLORS, make_scenes
from lavit_hf.training.dataset import EpochCallback, TrainingDataset
from lavit_hf.training.language_model.adapters import get_lora_config
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from tiny_models import spread_selector
from tiny_parts import build_text_model, build_text_tokenizer, build_vision_model

OLD_STYLE = re.compile(r"a (?P<background>\w+) background with (?P<colors>\w+( and \w+)*)")
NEW_STYLE = re.compile(r"(?P<colors>\w+( and \w+)*) with a (?P<background>\w+) background")


def colors_of(scene: dict) -> list[str]:
    return [color for color in COLORS if any(thing["color"] == color for thing in scene["objects"])]


def old_caption(scene: dict) -> str:
    return f"a {scene['background']} background with {' and '.join(colors_of(scene))}"


def new_caption(scene: dict) -> str:
    return f"{' and '.join(colors_of(scene))} with a {scene['background']} background"


def captioned(scenes: datasets.Dataset, caption: Callable[[dict], str]) -> list[dict]:
    return [{"image": row["image"], "text": caption(row["scene"])} for row in scenes]


def build_parts(scenes: datasets.Dataset) -> tuple[LavitForConditionalGeneration, ImageTextProcessor]:
    """A new LaVIT whose tokenizer knows the words of both styles."""
    texts = [caption(scene) for scene in scenes["scene"] for caption in (old_caption, new_caption)]
    tokenizer = build_text_tokenizer(texts, vocab_size=400)
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        vision_model=build_vision_model(
            hidden_size=64, intermediate_size=128, image_size=64, patch_size=16, initializer_range=0.05
        ),
        text_model=build_text_model(
            hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer), initializer_range=0.05
        ),
        codebook_size=20,
        codebook_dim=4,
        merger_num_layers=1,
    )
    processor = ImageTextProcessor.from_vision_text_pretrained(
        config=model,
        image_processor=LavitImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3),
        tokenizer=tokenizer,
    )
    pictures = processor.image_processor(list(scenes["image"])[:64], return_tensors="pt")["pixel_values"]
    spread_selector(model.visual_tokenizer, pictures)
    return model, processor


def train(model, processor: ImageTextProcessor, rows: list[dict], folder, **arguments) -> None:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            lr_scheduler_type="cosine",
            warmup_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=TrainingDataset(rows),
        data_collator=LavitDataCollator(processor, image_first_probability=1),
        callbacks=[EpochCallback()],
    )
    trainer.train()


@torch.no_grad()
def describe(model, processor: ImageTextProcessor, scenes: datasets.Dataset) -> list[str]:
    inputs = processor(images=list(scenes["image"]), text=["<image>"] * len(scenes), padding=True, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def judge(captions: list[str], scenes: datasets.Dataset, style: re.Pattern) -> tuple[float, float, float]:
    """Shares of captions in the style, of them with the right background, and of the colors named that are there."""
    found = [(style.fullmatch(caption), scene) for caption, scene in zip(captions, scenes["scene"], strict=True)]
    matches = [(match, scene) for match, scene in found if match is not None]
    if not matches:
        return 0.0, 0.0, 0.0
    backgrounds = [match["background"] == scene["background"] for match, scene in matches]
    colors = [color in colors_of(scene) for match, scene in matches for color in match["colors"].split(" and ")]
    return len(matches) / len(captions), sum(backgrounds) / len(matches), sum(colors) / len(colors)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_frozen_model_learns_a_new_style_of_captions(tmp_path):
    set_seed(0)
    scenes, few = make_scenes("train", num_scenes=2000), make_scenes("train", num_scenes=600, seed=1)
    unseen = make_scenes("validation", num_scenes=64)
    model, processor = build_parts(few)
    train(
        model,
        processor,
        captioned(scenes, old_caption),
        tmp_path,
        max_steps=500,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
    )
    before = describe(model, processor, unseen)
    style, background, colors = judge(before, unseen, OLD_STYLE)
    assert style >= 0.9 and background >= 0.9 and colors >= 0.6, "the base model has to know what it sees"
    assert judge(before, unseen, NEW_STYLE)[0] == 0

    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    # Nothing but adapters: what the base model knows is still there.
    adapted = get_peft_model(model, get_lora_config(model, modules_to_save=None))
    train(
        adapted,
        processor,
        captioned(few, new_caption),
        tmp_path,
        max_steps=250,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
    )
    style, background, colors = judge(describe(adapted, processor, unseen), unseen, NEW_STYLE)
    assert style >= 0.9
    # By chance a fourth of the backgrounds would be right, and a third of the colors.
    assert background >= 0.9 and colors >= 0.5
    with adapted.disable_adapter():
        assert describe(adapted, processor, unseen) == before
    base = adapted.unload()
    assert all(torch.equal(value, frozen[name]) for name, value in base.state_dict().items())
