"""Tokens that a user adds, as for pointing: from text to training, generation and the disk, end to end."""

import copy

import pytest
import torch
from peft import get_peft_model

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.language_model.adapters import get_lora_config
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from tiny_parts import CHECKPOINT, picture_rows

POINT, END, BOX = "<point>", "</point>", "<box>"
TEXT = f"the {BOX} is at {POINT}12, 34{END}"


@pytest.fixture(scope="module")
def own():
    """A processor that knows three more tokens, and a model with rows for them."""
    torch.manual_seed(0)
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=model)
    processor.tokenizer.add_special_tokens({"extra_special_tokens": [POINT, END]})
    processor.tokenizer.add_tokens([BOX])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return model, processor


def own_ids(processor) -> list[int]:
    return processor.tokenizer.convert_tokens_to_ids([BOX, POINT, END])


def test_a_step_of_training_moves_their_rows(own, tmp_path):
    model, processor = own
    picture = picture_rows(1)[0]["image"]
    rows = [
        {"image": picture, "text": TEXT, "sample_id": 0},
        {"image": picture, "messages": [{"role": "user", "content": f"is it at {POINT}?"}], "sample_id": 1},
    ]
    rows[1]["messages"] += [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}]
    batch = LavitDataCollator(processor)(rows)
    for ids in own_ids(processor):
        assert ((batch["labels"] == ids).sum(dim=-1) == 1).all()
    first = min(own_ids(processor))
    assert first == model.config.visual_token_offset + 64 == model.config.text_config.vocab_size - 3
    optimizer = torch.optim.SGD([model.lm_head.weight, model.get_input_embeddings().weight], lr=0.1)
    before = [group.detach().clone() for group in optimizer.param_groups[0]["params"]]
    model(**batch).loss.backward()
    optimizer.step()
    for old, new in zip(before, optimizer.param_groups[0]["params"], strict=True):
        assert (old[first:] != new[first:]).any(dim=-1).all()

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LavitForConditionalGeneration.from_pretrained(tmp_path)
    loaded = ImageTextProcessor.from_pretrained(tmp_path)
    inputs = processor(images=picture, text=f"<image>{TEXT}", return_tensors="pt")
    loaded.visual_tokenizer = again
    found = loaded(images=picture, text=f"<image>{TEXT}", return_tensors="pt")
    assert inputs.keys() == found.keys() and all(torch.equal(inputs[name], found[name]) for name in inputs)
    with torch.no_grad():
        assert torch.equal(again(**found).logits, model(**inputs).logits)


def test_lora_learns_their_rows(own):
    model, processor = own
    adapted = get_peft_model(copy.deepcopy(model), get_lora_config(model))
    batch = LavitDataCollator(processor)([{"image": picture_rows(1)[0]["image"], "text": TEXT, "sample_id": 0}])
    adapted(**batch).loss.backward()
    learned = {name: weight for name, weight in adapted.named_parameters() if "modules_to_save" in name}
    assert len(learned) == 2
    for weight in learned.values():
        assert weight.grad[min(own_ids(processor)) :].ne(0).any(dim=-1).all()


def test_chats_may_name_them(own):
    _, processor = own
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture_rows(1)[0]["image"]}]},
        {"role": "assistant", "content": TEXT},
    ]
    chat[0]["content"].append({"type": "text", "text": f"where is {POINT}, and not <image> or </s>?"})
    encoded = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, is_answer = encoded["input_ids"][0], encoded["assistant_masks"][0]
    box, point, end = own_ids(processor)
    assert [ids.count(index) for index in (box, point, end)] == [1, 2, 1]
    assert [index for index, mark in zip(ids, is_answer, strict=True) if mark and index in (box, point, end)] == [
        box,
        point,
        end,
    ]
    assert f"where is {POINT}, and not <image> or </s>?" in processor.apply_chat_template(chat, tokenize=False)


def test_text_may_write_them_and_drawings_not(own):
    model, processor = own
    new = set(own_ids(processor))
    head = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.data[:] = 0.0
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 40, "eos_token_id": []}
        inputs = processor(text=[f"where is {POINT}?"] * 8, return_tensors="pt")
        written = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        assert new & set(written.flatten().tolist())
        drawing = processor(text=[f"where is {POINT}?"] * 8, generation_mode="image", return_tensors="pt")
        width = drawing["input_ids"].shape[1]
        for more in ({}, {"guidance_scale": 2.0}, {"suppress_tokens": [3, 4]}):
            drawn = model.generate(**drawing, **options, **more, generation_mode="image")[:, width:]
            assert not new & set(drawn.flatten().tolist())
    finally:
        model.lm_head.weight.data[:] = head
