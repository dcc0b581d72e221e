"""TRL's usual recipe, its own collator included, on a model that captions already: it stays as good."""

from pathlib import Path

import datasets
from trl import SFTConfig, SFTTrainer

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, default_checkpoint
from lavit_hf.hub.facts import world_of

WORLD = world_of(default_checkpoint())
NUM_JUDGED = 32


def count_right(model, processor, scenes: datasets.Dataset) -> int:
    """How many captions say what is true, and nothing else."""
    model.eval()
    inputs = processor(images=list(scenes["image"]), text=["<image>"] * len(scenes), padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=64)
    captions = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(
        WORLD.parse_caption(caption.strip()) == WORLD.facts_of(WORLD.scene_from_dict(scene))
        for caption, scene in zip(captions, scenes["scene"], strict=True)
    )


def test_captions_stay_right(tmp_path: Path) -> None:
    """Regression: placeholders had no row in the head, so that the loss fell below zero, and captions were lost."""
    model = LavitForConditionalGeneration.from_pretrained(default_checkpoint())
    processor = ImageTextProcessor.from_pretrained(default_checkpoint())
    judged = WORLD.make_dataset("validation", NUM_JUDGED)
    before = count_right(model, processor, judged)
    assert before > NUM_JUDGED / 2
    rows = [
        {
            "images": [row["image"]],
            "messages": [
                {"role": "user", "content": [{"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]},
            ],
        }
        for row in WORLD.make_dataset("train", 64)
    ]
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses) > 0
    assert count_right(model, processor, judged) >= before - 4, before  # as many as chance takes or gives
