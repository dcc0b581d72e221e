import logging

import pytest
import torch

from lavit_hf import ImageTextProcessor
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.language_model.generation_metrics import GenerationMetrics
from tiny_parts import CHECKPOINT, picture_rows
from training.tiny_training import build_trainer


def score(written: list[str], references: list[str]) -> dict[str, float]:
    assert len(written) == len(references)
    return {"exact": sum(map(str.__eq__, written, references)) / len(written)}


@pytest.fixture
def trainer(tmp_path):
    return build_trainer(tmp_path)


def light() -> ImageTextProcessor:
    return ImageTextProcessor.from_pretrained(CHECKPOINT)


def pictured(count: int = 5) -> TrainingDataset:
    return TrainingDataset([row for row in picture_rows(count + 2) if row["image"] is not None][:count])


def test_trainer_reports_what_was_written(tmp_path):
    """And picks the best checkpoint by it."""
    trainer = build_trainer(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="exact",
    )
    metrics = GenerationMetrics(trainer.model, light(), pictured(), lambda *texts: {"exact": next(found)})
    found = iter([0.75, 0.5])
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = metrics, metrics.drop_logits
    trainer.train()
    logged = [entry["eval_exact"] for entry in trainer.state.log_history if "eval_exact" in entry]
    assert logged == [0.75, 0.5]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


def test_rows_are_written_as_by_hand(trainer):
    seen = {}
    metrics = GenerationMetrics(
        trainer.model,
        light(),
        pictured(3),
        lambda written, references: seen.update(written=written, references=references) or {},
        batch_size=2,
        max_new_tokens=6,
    )
    trainer.model.train()
    metrics()
    assert trainer.model.training, "as it was"
    assert seen["references"] == [row["text"] for row in picture_rows(3)]
    trainer.model.eval()
    for written, row in zip(seen["written"], picture_rows(3), strict=True):
        inputs = light()(images=row["image"], text="<image>", return_tensors="pt")
        output = trainer.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert written == light().decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_prompts_and_chats(trainer):
    image = picture_rows(1)[0]["image"]
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x?"}]}
    dataset = TrainingDataset(
        [
            {"image": image, "prompt": "Question: x? Answer:", "text": "red", "messages": None},
            {"image": image, "text": None, "messages": [question, {"role": "assistant", "content": "red"}]},
            {"image": None, "prompt": "a", "text": " cat ", "messages": None},
        ]
    )
    seen = {}
    metrics = GenerationMetrics(
        trainer.model,
        light(),
        dataset,
        lambda written, references: seen.update(written=written, references=references) or {},
        max_new_tokens=4,
    )
    metrics()
    assert seen["references"] == ["red", "red", "cat"]
    assert seen["written"][0] == seen["written"][1], "both ask the same"


def ask(trainer, rows: list[dict], **arguments) -> dict:
    """What is written and expected, and whatever the model reads for it."""
    seen: dict = {"inputs": []}
    generate = trainer.model.generate

    def record(**inputs):
        seen["inputs"].append(inputs)
        return generate(**inputs)

    def collect(written, references):
        return seen.update(written=written, references=references) or {}

    trainer.model.generate = record
    metrics = GenerationMetrics(trainer.model, light(), TrainingDataset(rows), collect, max_new_tokens=4, **arguments)
    metrics()
    return seen


def chat(*turns) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def test_images_inside_messages(trainer):
    """They are in the messages themselves, or among the images of the row, or some here and some there."""
    first, second = (picture_rows(2)[index]["image"] for index in range(2))
    inside = [{"type": "image", "image": first}, {"type": "image", "image": second}, {"type": "text", "text": "x?"}]
    given = [{"type": "image", "image": None}, inside[1], {"type": "text", "text": "x?", "image": None}]
    rows = [
        {"image": None, "messages": chat(("user", inside), ("assistant", "red"))},
        {"image": first, "messages": chat(("user", given), ("assistant", "blue"))},
        {"image": [first, second], "prompt": "Question: x? Answer:", "text": "green", "messages": None},
    ]
    seen = ask(trainer, rows)
    assert seen["references"] == ["red", "blue", "green"]
    chats, prompt = seen["inputs"]
    pixels = prompt["pixel_values"]
    assert torch.equal(chats["pixel_values"], torch.cat([pixels, pixels]))
    assert torch.equal(chats["input_ids"], prompt["input_ids"].expand(2, -1))
    assert len(set(seen["written"])) == 1


@pytest.mark.parametrize("after", [[("user", "and now?")], [("user", "draw it"), ("assistant", [{"type": "image"}])]])
def test_a_chat_is_asked_for_the_last_text_of_the_assistant(trainer, after):
    image = picture_rows(1)[0]["image"]
    question = ("user", [{"type": "image", "image": image}, {"type": "text", "text": "x?"}])
    row = {"image": image if len(after) > 1 else None, "messages": chat(question, ("assistant", "red"), *after)}
    whole = {"image": None, "messages": chat(question, ("assistant", "red"))}
    seen = ask(trainer, [row, whole], batch_size=1)
    assert seen["references"] == ["red", "red"]
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(seen["inputs"][0][name], seen["inputs"][1][name])


def test_text_of_a_chat_is_no_placeholder(trainer):
    seen = ask(trainer, [{"image": None, "messages": chat(("user", "what is <image>?"), ("assistant", "text"))}])
    assert "pixel_values" not in seen["inputs"][0]
    assert "<image>" in light().decode(seen["inputs"][0]["input_ids"][0])


def test_what_the_assistant_drew_is_read_as_codes(trainer):
    image = picture_rows(1)[0]["image"]
    drawn = ("assistant", [{"type": "image", "image": image}])
    row = {"image": None, "messages": chat(("user", "draw"), drawn, ("user", "what is it?"), ("assistant", "a cat"))}
    (inputs,) = ask(trainer, [row])["inputs"]
    assert "pixel_values" not in inputs
    ids = light().tokenize_images(image)[0].tolist()
    start = inputs["input_ids"][0].tolist().index(ids[0])
    assert inputs["input_ids"][0].tolist()[start : start + len(ids)] == ids


def test_text_with_placeholders_is_written_from_its_last_image(trainer):
    first, second = (picture_rows(2)[index]["image"] for index in range(2))
    rows = [
        {"image": [first, second], "text": "<image>one, <image>two", "prompt": None},
        {"image": [first, second], "text": "two", "prompt": "<image>one, <image>"},
    ]
    seen = ask(trainer, rows)
    assert seen["references"] == ["two", "two"]
    (inputs,) = seen["inputs"]
    assert torch.equal(*inputs["input_ids"]) and torch.equal(*inputs["pixel_values"].chunk(2))


def test_rows_that_nothing_can_be_asked_of_are_left_out(trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    image = picture_rows(1)[0]["image"]
    rows = [
        {"image": None, "text": "text alone", "prompt": None, "messages": None},
        {"image": image, "text": "<image>", "prompt": "draw", "messages": None},
        {"image": image, "text": "here: <image>", "prompt": "draw", "messages": None},
        {"image": image, "messages": chat(("user", "draw"), ("assistant", [{"type": "image"}]))},
    ]
    seen = ask(trainer, rows)
    assert seen["references"] == ["here:"]
    assert "pixel_values" not in seen["inputs"][0], "the image to draw is none to read"
    assert "3 of 4 rows" in caplog.text
    with pytest.raises(ValueError, match="No row of the dataset has an image or a prompt"):
        ask(trainer, rows[:2])


def test_a_model_that_has_learned_is_told_from_one_that_has_not(trainer):
    dataset = TrainingDataset(picture_rows(3))
    metrics = GenerationMetrics(trainer.model, light(), dataset, score, max_new_tokens=60)
    assert metrics()["exact"] == 0
    trainer.train_dataset = dataset
    trainer.args.num_train_epochs, trainer.args.learning_rate = 25, 1e-2
    trainer.data_collator.image_first_probability = 1
    trainer.train()
    assert metrics()["exact"] == 1


def test_codes_cannot_be_asked_about(trainer):
    dataset = [{"codes": [[1]], "text": "a", "sample_id": 7}]
    with pytest.raises(ValueError, match="Sample 7 has codes"):
        GenerationMetrics(trainer.model, light(), dataset, score)()


def test_no_logits_are_kept():
    labels = torch.zeros(3, 9, dtype=torch.long)
    assert GenerationMetrics.drop_logits((torch.zeros(3, 9, 50),), labels).numel() == 3
