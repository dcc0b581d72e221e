import pickle
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.language_model import data_collator
from lavit_hf.training.language_model.data_collator import (
    LavitDataCollator,
    Segment,
    TrainingRow,
    join_rows,
    pad_rows,
)
from lavit_hf.utils.seeds import sample_uniform
from tiny_parts import CHECKPOINT

EOS, BOI, EOI, CODE_0, PLACEHOLDER = 2, 300, 301, 302, 0
PATCHES = 16


@pytest.fixture(scope="module")
def model() -> LavitForConditionalGeneration:
    return LavitForConditionalGeneration.from_pretrained(CHECKPOINT)


@pytest.fixture
def processor(model) -> ImageTextProcessor:
    return ImageTextProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=model)


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy()).resize((56, 56))


def row(text="a cat", images=1, sample_id=0, epoch=0, **fields) -> dict:
    pictures = [picture(sample_id + index) for index in range(images)]
    return {"images": pictures, "text": text, "sample_id": sample_id, "epoch": epoch, **fields}


def describe(batch: dict, processor, index: int = 0) -> tuple[str, str]:
    """The whole row, and what of it is learned, with images spelled out."""
    mask = batch["attention_mask"][index].bool() if "attention_mask" in batch else slice(None)
    ids, labels = batch["input_ids"][index][mask], batch["labels"][index][mask]
    return spell(ids, processor), spell(ids[labels != -100], processor)


def spell(ids: torch.Tensor, processor) -> str:
    names = {BOI: "[", EOI: "]", EOS: "$"}
    pieces: list = []
    for value in ids.tolist():
        if value in names:
            pieces.append(names[value])
        elif value == PLACEHOLDER or value >= CODE_0:
            pieces.append("#" if value == PLACEHOLDER else "c")
        else:
            piece = processor.tokenizer.convert_ids_to_tokens(value).replace("▁", "_")
            pieces.append(chr(int(piece[1:-1], 16)) if piece.startswith("<0x") else piece)
    return "".join(pieces)


def codes_of(processor, image: Image.Image) -> str:
    return "c" * (len(processor.tokenize_images(image)[0]) - 2)


READ = f"[{'#' * PATCHES}]"

# The two orders


def test_image_first_reads_features_and_learns_the_text(processor):
    batch = LavitDataCollator(processor, image_first_probability=1)([row()])
    assert describe(batch, processor) == (f"{READ}_a_cat$", "_a_cat$")
    assert batch["pixel_values"].shape == (1, 3, 56, 56)
    expected = processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_text_first_learns_text_and_codes(processor):
    batch = LavitDataCollator(processor, image_first_probability=0, condition_dropout=0)([row()])
    drawn = f"[{codes_of(processor, picture())}]"
    assert describe(batch, processor) == (f"_a_cat{drawn}$", f"_cat{drawn}$"), "nothing predicts the first id"
    assert "pixel_values" not in batch
    ids = batch["input_ids"][0]
    start = (ids == BOI).nonzero().item()
    assert torch.equal(ids[start:-1], processor.tokenize_images(picture())[0])


def test_a_dropped_condition_leaves_the_image_alone(processor):
    """The context of guidance is the image start alone."""
    batch = LavitDataCollator(processor, image_first_probability=0, condition_dropout=1)([row()])
    codes = codes_of(processor, picture())
    assert describe(batch, processor) == (f"[{codes}]$", f"{codes}]$")


def test_decisions_are_those_of_the_sample(processor):
    rows = [row(sample_id=index, epoch=3) for index in range(40)]
    collator = LavitDataCollator(processor, seed=5)
    together = collator(rows)
    dropped = 0
    for index, single in enumerate(rows):
        expected = describe(collator([single]), processor)
        assert describe(together, processor, index) == expected, "whatever else is in the batch"
        is_image_first = sample_uniform(5, 3, index, "order") < 0.5
        is_dropped = not is_image_first and sample_uniform(5, 3, index, "condition") < 0.1
        dropped += is_dropped
        assert expected[0].startswith("[" if is_image_first or is_dropped else "_a_cat")
        assert ("#" in expected[0]) == is_image_first
    assert dropped > 0


def test_other_epochs_decide_otherwise(processor):
    collator = LavitDataCollator(processor)
    orders = [
        [describe(collator([row(sample_id=index, epoch=epoch)]), processor)[0] for index in range(8)]
        for epoch in (0, 1)
    ]
    assert orders[0] != orders[1]


# Other rows


def test_text_alone(processor):
    batch = LavitDataCollator(processor)([row(images=0)])
    assert describe(batch, processor) == ("_a_cat$", "_cat$")
    assert "pixel_values" not in batch


def test_several_images(processor):
    read = LavitDataCollator(processor, image_first_probability=1)([row(images=2)])
    assert describe(read, processor) == (f"{READ}{READ}_a_cat$", "_a_cat$")
    assert len(read["pixel_values"]) == 2
    write = LavitDataCollator(processor, image_first_probability=0, condition_dropout=0)([row(images=2)])
    drawn = "".join(f"[{codes_of(processor, picture(index))}]" for index in range(2))
    assert describe(write, processor) == (f"_a_cat{drawn}$", f"_cat{drawn}$")


def test_placeholders_in_the_text_keep_images_where_they_are(processor):
    interleaved = row("a<image>b", images=1)
    read = LavitDataCollator(processor, image_first_probability=1)([interleaved])
    assert describe(read, processor) == (f"_a{READ}_b$", "_b$")
    write = LavitDataCollator(processor, image_first_probability=0, condition_dropout=1)([interleaved])
    codes = codes_of(processor, picture())
    assert describe(write, processor) == (f"_a[{codes}]_b$", f"[{codes}]_b$")


def test_of_a_prompt_nothing_is_learned(processor):
    collator = LavitDataCollator(processor, image_first_probability=0)
    batch = collator([row("red", prompt="Question: x? Answer:")])
    text, learned = describe(batch, processor)
    assert (text, learned) == (f"{READ}_Question:_x?_Answer:_red$", "_red$")
    light = ImageTextProcessor.from_pretrained(CHECKPOINT)
    prompt = light(images=picture(), text="<image>Question: x? Answer:")["input_ids"][0]
    assert batch["input_ids"][0].tolist()[: len(prompt)] == prompt, "as when the model is asked"


def test_a_prompt_may_say_where_its_image_goes(processor):
    batch = LavitDataCollator(processor)([row("b", prompt="a<image>")])
    assert describe(batch, processor) == (f"_a{READ}_b$", "_b$")


def test_an_image_in_an_answer_is_drawn(processor):
    batch = LavitDataCollator(processor)([row("<image>", prompt="draw")])
    drawn = f"[{codes_of(processor, picture())}]"
    assert describe(batch, processor) == (f"_draw{drawn}$", f"{drawn}$")


def test_noise_is_read_but_not_learned(processor):
    rows = [row(text="a b c d e f g h", sample_id=index) for index in range(8)]
    clean = LavitDataCollator(processor, image_first_probability=1)(rows)
    noisy = LavitDataCollator(processor, image_first_probability=1, text_noise=0.5)(rows)
    assert torch.equal(noisy["labels"], clean["labels"])
    is_changed = noisy["input_ids"] != clean["input_ids"]
    is_word = (clean["labels"] != -100) & (clean["input_ids"] != EOS)
    assert not is_changed[~is_word].any()
    assert 0.3 < is_changed[is_word].float().mean() < 0.6, "half, of which some by themselves"
    assert set(noisy["input_ids"][is_changed].tolist()) <= set(clean["input_ids"][is_word].tolist())
    assert torch.equal(
        LavitDataCollator(processor, image_first_probability=1, text_noise=0.5)(rows)["input_ids"], noisy["input_ids"]
    )


def test_what_says_what_to_draw_has_no_noise(processor):
    answer = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "cats"}]},
    ]
    rows = [
        row(sample_id=0),  # drawn
        row(images=0, sample_id=1),
        row(text="<image> of cats", prompt="what", sample_id=2),
        row(text=None, messages=answer, sample_id=3),
    ]
    arguments = {"image_first_probability": 0, "condition_dropout": 0}
    clean = LavitDataCollator(processor, **arguments)(rows)
    noisy = LavitDataCollator(processor, text_noise=1, **arguments)(rows)
    is_same = (noisy["input_ids"] == clean["input_ids"]).all(dim=1)
    assert is_same[:3].all()
    is_question = (clean["labels"] == -100)[3]
    assert torch.equal(noisy["input_ids"][3][is_question], clean["input_ids"][3][is_question])


def test_which_words_are_wrong_does_not_depend_on_the_batch(processor):
    rows = [row(text="a b c d e f g h", sample_id=0), row(text="i j k l m n o p q r s t u v w", sample_id=1)]
    collator = LavitDataCollator(processor, image_first_probability=1, text_noise=0.5)
    clean = LavitDataCollator(processor, image_first_probability=1)(rows)["input_ids"][0]
    together, alone = collator(rows)["input_ids"][0], collator(rows[:1])["input_ids"][0]
    is_changed = alone != clean[: len(alone)]  # a word may be replaced by itself here, but hardly beside others
    assert is_changed.any() and (together != clean)[: len(alone)][is_changed].all()


def test_an_image_with_codes_is_read_as_features_and_drawn_from_them(processor, monkeypatch):
    row = {"images": [picture()], "codes": [[5, 6, 7]], "text": "a", "sample_id": 0}
    monkeypatch.setattr(processor, "tokenize_pixels", None)  # nothing is encoded
    read = LavitDataCollator(processor, image_first_probability=1.0, keep_rate_range=(0.5, 0.5))([row])
    assert len(read["pixel_values"]) == 1 and read["num_image_tokens"].tolist() == [processor.image_seq_length // 2]
    drawn = LavitDataCollator(processor, image_first_probability=0.0, condition_dropout=0.0)([row])
    assert "pixel_values" not in drawn
    codes = processor.tokenizer.convert_codes_to_ids([5, 6, 7])
    assert drawn["input_ids"][0, -5:-2].tolist() == drawn["labels"][0, -5:-2].tolist() == codes
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "again"}]},
        {"role": "assistant", "content": [{"type": "image"}]},
    ]
    both = {"images": [picture(), picture(1)], "codes": [[1], [5, 6, 7]], "messages": chat, "sample_id": 0}
    batch = LavitDataCollator(processor)([both])
    assert len(batch["pixel_values"]) == 1
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    first = ids.index(codes[0])
    assert ids[first : first + 3] == labels[first : first + 3] == codes
    with pytest.raises(ValueError, match=r"it has 2 image\(s\), but codes of 1"):
        LavitDataCollator(processor)([{**both, "codes": [[1]]}])


def test_codes_need_no_images(processor):
    processor.visual_tokenizer = None
    tokenized = {"codes": [[5, 6, 7]], "text": "a", "sample_id": 0}
    read = LavitDataCollator(processor, image_first_probability=1)([tokenized])
    assert describe(read, processor) == ("[ccc]_a$", "_a$")
    write = LavitDataCollator(processor, image_first_probability=0, condition_dropout=0)([tokenized])
    assert describe(write, processor) == ("_a[ccc]$", "[ccc]$")
    assert write["input_ids"][0].tolist() == [259, BOI, CODE_0 + 5, CODE_0 + 6, CODE_0 + 7, EOI, EOS]


def test_images_without_tokens(processor):
    batch = LavitDataCollator(processor)([{"codes": [[]], "text": "a", "sample_id": 0}])
    assert "[]" in describe(batch, processor)[0]


def test_a_chat_learns_what_the_assistant_says_and_draws(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": [{"type": "image", "image": picture(7)}]},
    ]
    batch = LavitDataCollator(processor)([row(None, messages=messages)])
    drawn = f"[{codes_of(processor, picture(7))}]"
    text = f"{READ}_Question:_x?_Answer:_red$_Question:_draw{drawn}$"
    assert describe(batch, processor) == (text, f"_red${drawn}$")  # the end of every answer is learned
    assert len(batch["pixel_values"]) == 1


def test_a_drawn_answer_ends_before_the_next_turn(processor):
    """Regression: only the last one did, so that the model would have gone on after any other drawing."""
    picture_of = {number: {"type": "image", "image": picture(number)} for number in (5, 6, 7)}
    messages = [
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": [picture_of[5], picture_of[6]]},
        {"role": "user", "content": [picture_of[7], {"type": "text", "text": "x?"}]},
        {"role": "assistant", "content": [picture_of[5], {"type": "text", "text": "red"}]},
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": [picture_of[6]]},
    ]
    batch = LavitDataCollator(processor)([row(None, 0, messages=messages)])
    drawn = {number: f"[{codes_of(processor, picture(number))}]" for number in (5, 6)}
    _, learned = describe(batch, processor)
    assert learned == f"{drawn[5]}{drawn[6]}${drawn[5]}_red${drawn[6]}$"


def test_an_image_beside_a_chat_of_texts_is_asked_about(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "x?"}]
    answer = {"role": "assistant", "content": "red"}
    found, expected = (
        LavitDataCollator(processor)([row(None, messages=[{"role": "user", "content": content}, answer])])
        for content in ("x?", parts)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_images_before_a_drawing_are_bare_codes_as_in_generation(processor):
    batch = LavitDataCollator(processor)([row("<image>", images=2, prompt="<image>draw")])
    first, second = (codes_of(processor, picture(seed)) for seed in (0, 1))
    assert describe(batch, processor) == (f"{first}_draw[{second}]$", f"[{second}]$")
    asked = processor(images=picture(), text="<image>draw", generation_mode="image", return_tensors="pt")["input_ids"][
        0
    ]
    assert batch["input_ids"][0].tolist()[: len(asked)] == asked.tolist()


def test_a_chat_is_the_prompt_that_the_template_makes(processor):
    question = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "x?"}]}]
    batch = LavitDataCollator(processor)([row(None, 0, messages=[*question, {"role": "assistant", "content": "red"}])])
    light = ImageTextProcessor.from_pretrained(CHECKPOINT)
    prompt = light.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = batch["input_ids"][0].tolist()
    assert ids[: len(prompt["input_ids"][0])] == prompt["input_ids"][0]
    assert describe(batch, processor)[1] == "_red$"


# Batches


def test_padding_is_neither_seen_nor_learned(processor):
    rows = [row("a", 0, 0), row("a cat sat", 1, 1)]
    batch = LavitDataCollator(processor, image_first_probability=1, pad_to_multiple_of=8)(rows)
    assert batch["input_ids"].shape[1] % 8 == 0
    mask = batch["attention_mask"].bool()
    assert (batch["labels"][~mask] == -100).all()
    assert (batch["input_ids"][~mask] == processor.tokenizer.pad_token_id).all()
    assert mask[0, 0] and not mask[0, -1], "on the right, where no position is left that sees nothing"


def test_the_model_counts_the_labels_that_trainer_counts(processor, model):
    """`num_items_in_batch` divides the loss: placeholders, padding and first ids must not be in it."""
    rows = [row(sample_id=index, images=index % 3) for index in range(6)]
    batch = LavitDataCollator(processor)(rows)
    count = batch["labels"][:, 1:].ne(-100).sum()
    mean = model(**batch).loss
    total = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    torch.testing.assert_close(total, mean * count)


def test_batches_are_the_same_from_worker_processes(processor):
    dataset = TrainingDataset([{"image": picture(index), "text": f"cat {index}"} for index in range(6)])
    collator = LavitDataCollator(processor)
    loaders = [DataLoader(dataset, batch_size=3, collate_fn=collator, num_workers=workers) for workers in (0, 1)]
    for expected, batch in zip(*loaders, strict=True):
        assert expected.keys() == batch.keys()
        assert all(torch.equal(expected[name], batch[name]) for name in expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_first_probability": 0.0, "condition_dropout": 0.0, "blank_image": True, "max_length": 30},
        {"text_noise": 0.5, "keep_rate_range": (0.2, 0.8)},
        {"packing": True, "keep_rate_range": (0.2, 0.8)},
    ],
)
def test_workers_leave_codes_to_the_main_process(processor, monkeypatch, options):
    rows = [{"image": picture(index), "text": f"cat {index} sat"} for index in range(6)]
    rows[2] = {"prompt": "<image> again", "text": "<image>", "images": [picture(7), picture(8)]}  # bare, and drawn
    rows = [{"sample_id": index, "epoch": 0, **row} for index, row in enumerate(rows)]
    expected = [LavitDataCollator(processor, **options)(rows[start : start + 2]) for start in (0, 2, 4)]
    collator = LavitDataCollator(processor, encode_later=True, **options)
    with monkeypatch.context() as patched:
        patched.setattr(type(processor.visual_tokenizer), "device", torch.device("cuda"))
        batches = list(DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=1))
    assert "rows" in batches[1] and batches[1]["sample_ids"].tolist() == [2, 3]
    for batch, wanted in zip(map(collator.finish, batches), expected, strict=True):
        assert batch.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value, name


def test_worker_processes_cannot_use_an_accelerator(processor, monkeypatch):
    monkeypatch.setattr(type(processor.visual_tokenizer), "device", torch.device("cuda"))
    monkeypatch.setattr(data_collator, "get_worker_info", lambda: SimpleNamespace(id=0))
    with pytest.raises(ValueError, match=r"cannot use a visual tokenizer on cuda\. Leave images to the main process"):
        LavitDataCollator(processor, image_first_probability=0)([row()])


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([], []),
        ([([5, 6], [True, True])], [-100, 6, EOS]),
        ([([5, 6], [True, False])], [-100, -100]),
        ([([5, 6, EOS], [True, True, False])], [-100, 6, EOS]),  # a chat template wrote it
        ([([5, 6], [True, True]), ([], [])], [-100, 6, EOS]),
    ],
)
def test_learned_text_ends_once(segments, expected):
    learned = TrainingRow(0, [Segment(ids=ids, is_learned=is_learned) for ids, is_learned in segments])
    learned.end(EOS)
    assert learned.labels[: len(learned)] == expected


def test_a_collator_can_be_sent_to_another_process(processor):
    clone = pickle.loads(pickle.dumps(LavitDataCollator(processor, image_first_probability=1)))
    assert describe(clone([row()]), processor)[1] == "_a_cat$"


def test_codes_do_not_depend_on_training_mode(processor, model):
    collator = LavitDataCollator(processor, image_first_probability=0)
    expected = collator([row()])
    model.train()
    model.visual_tokenizer.vision_model.encoder.layers[0].self_attn.dropout = 0.5
    assert torch.equal(collator([row()])["input_ids"], expected["input_ids"])
    assert model.visual_tokenizer.training
    model.eval()


def test_images_of_random_budgets(processor, model):
    """Every image that is read gets its share by its sample and epoch, whatever else is in the batch."""
    options = {"keep_rate_range": (0.1, 0.7)}
    read = LavitDataCollator(processor, image_first_probability=1, **options)
    rows = [row(sample_id=index, images=1 + index % 2) for index in range(8)]
    batch = read(rows)
    counts = batch["num_image_tokens"].tolist()
    assert len(counts) == len(batch["pixel_values"]) == 12
    assert len(set(counts)) > 3 and 2 <= min(counts) <= max(counts) <= 11
    assert (batch["input_ids"] == PLACEHOLDER).sum() == sum(counts)
    again = read(rows[3:4])
    assert again["num_image_tokens"].tolist() == counts[4:6]
    assert read([{**one, "epoch": 1} for one in rows])["num_image_tokens"].tolist() != counts
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    model.zero_grad()
    blank = LavitDataCollator(processor, blank_image=True, **options)([row(images=0)])
    assert blank["num_image_tokens"].tolist() == [1]


def test_images_that_are_drawn_have_the_tokens_that_the_selector_keeps(processor):
    """No prompt says how many there are to be; images in the prompt of a drawing have their budgets."""
    options = {"image_first_probability": 0, "condition_dropout": 0}
    rows = [row(sample_id=index) for index in range(4)]
    ranged = LavitDataCollator(processor, keep_rate_range=(0.1, 0.7), **options)(rows)
    assert torch.equal(ranged["input_ids"], LavitDataCollator(processor, **options)(rows)["input_ids"])
    prompt = {"images": [picture(), picture(1)], "prompt": "<image> in blue", "text": "<image>", "sample_id": 0}
    batches = [LavitDataCollator(processor, keep_rate_range=rates)([prompt]) for rates in (None, (0.25, 0.25))]
    free, ranged = (batch["input_ids"][0].tolist() for batch in batches)
    start = processor.tokenizer.boi_token_id
    assert sum(index >= CODE_0 for index in ranged[: ranged.index(start)]) == processor.image_seq_length // 4
    assert ranged[ranged.index(start) :] == free[free.index(start) :]


@pytest.mark.parametrize("max_length", [None, 48])
def test_images_with_budgets_can_be_packed(processor, model, max_length):
    """Same loss and gradients as with padding, though sequences hold the images in another order."""
    rows = [row("a cat" + " sat" * index, sample_id=index, images=1 + index % 2) for index in range(5)]
    results = []
    for packing in (False, True):
        options = {"keep_rate_range": (0.1, 0.7), "max_length": max_length, "image_first_probability": 1}
        batch = LavitDataCollator(processor, packing=packing, **options)(rows)
        assert ("position_ids" in batch) == packing and len(batch["num_image_tokens"]) == 7
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad, model.model.multi_modal_projector.weight.grad))
    model.zero_grad()
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-4)


def test_a_blank_image_keeps_every_layer_busy(processor, model):
    rows = [row("a cat", images=0)]
    plain, blank = LavitDataCollator(processor)(rows), LavitDataCollator(processor, blank_image=True)(rows)
    torch.testing.assert_close(model(**plain).loss, model(**blank).loss)
    model(**blank).loss.backward()
    merger = model.visual_tokenizer.continuous.merger
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in merger.parameters())
    model.zero_grad()
    with_image = LavitDataCollator(processor, blank_image=True, image_first_probability=1)([row()])
    assert len(with_image["input_ids"]) == 1, "not needed where there is an image"


# Length


@pytest.mark.parametrize(("excess", "expected"), [(0, "_a_cat$"), (1, "_a_cat"), (4, "_a")])
def test_the_end_of_learned_text_is_cut(processor, excess, expected):
    length = len(processor.tokenizer("a cat")["input_ids"]) + PATCHES + 3
    collator = LavitDataCollator(processor, image_first_probability=1, max_length=length - excess)
    assert describe(collator([row()]), processor) == (READ + expected, expected)


def test_prompts_are_cut_first_and_from_their_start(processor):
    sample = row("red", prompt="first second")
    length = LavitDataCollator(processor)([sample])["input_ids"].shape[1]
    batch = LavitDataCollator(processor, max_length=length - 4)([sample])
    text, learned = describe(batch, processor)
    assert text.startswith(READ) and text.endswith("second_red$") and "first" not in text
    assert learned == "_red$"


def test_text_before_a_drawn_image_is_cut_instead_of_the_image(processor):
    collator = LavitDataCollator(processor, image_first_probability=0, condition_dropout=0)
    length = collator([row()])["input_ids"].shape[1]
    collator.max_length = length - 4
    text, _ = describe(collator([row()]), processor)
    assert text.endswith(f"[{codes_of(processor, picture())}]")


def test_images_that_do_not_fit(processor):
    with pytest.raises(ValueError, match="images of sample 3 take 18 tokens and cannot be cut"):
        LavitDataCollator(processor, image_first_probability=1, max_length=18)([row(sample_id=3)])
    drawn = {"codes": [[1, 2]], "text": "a", "sample_id": 3}
    collator = LavitDataCollator(processor, image_first_probability=0, condition_dropout=1, max_length=4)
    assert describe(collator([drawn]), processor)[0] == "[cc]"
    collator.max_length = 3
    with pytest.raises(ValueError, match="images of sample 3 take 4 tokens"):
        collator([drawn])


# Errors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"input_ids": range(3)}], "remove_unused_columns=False"),
        ([{"text": "a", "sample_id": "first"}], "sample_id 'first' is no integer"),
        ([{"text": " ", "sample_id": 4}], "Sample 4 is bad: the text is empty"),
        ([{"text": 5, "sample_id": 4}], "Sample 4 is bad: the text is of type int"),
        ([{"text": "a", "prompt": 5, "sample_id": 4}], "Sample 4 is bad: the prompt is of type int"),
        ([{"text": "a", "messages": 0, "sample_id": 4}], "Sample 4 is bad: one of its messages"),
        ([{"text": "a", "codes": [5], "sample_id": 4}], "Sample 4 is bad: its codes"),
        ([{"text": "a", "image": 5, "sample_id": 4}], "Sample 4 is bad: the image is of type int"),
        ([{"text": "\ud83d", "sample_id": 4}], "Sample 4 is bad: A text holds the lone surrogate"),
        ([row("<image><image>")], r"has 1 image\(s\), but its text has 2 <image>"),
        ([row("a", 0, prompt="<image>")], r"has 0 image\(s\), but its text has 1 <image>"),
        ([row(None, 0, messages=[{"role": "user", "content": "hi"}])], "nothing to learn"),
        (
            [row(None, 0, messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}])],
            "messages of the assistant are empty",
        ),
        (
            [row(None, 1, messages=[{"role": "assistant", "content": "hi"}])],
            r"has 1 image\(s\), but its messages have 0 part\(s\)",
        ),
        (
            [row(None, 0, messages=[{"role": "assistant", "content": [{"type": "image"}]}])],
            r"has 0 image\(s\), but its messages have 1 part\(s\)",
        ),
        ([{"codes": [[64]], "text": "a", "sample_id": 0}], "64 is not a code: expected 0 to 63"),
    ],
)
def test_rows_that_cannot_be_learned_from(processor, rows, message):
    with pytest.raises(ValueError, match=message):
        LavitDataCollator(processor)(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_first_probability": 1.5}, "from 0 to 1, got 1.5"),
        ({"condition_dropout": -1}, "from 0 to 1, got -1"),
        ({"text_noise": 2}, "from 0 to 1, got 2"),
        ({"max_length": 1}, "at least 2"),
        ({"packing": True, "blank_image": True}, "are packed with a `keep_rate_range` only"),
        ({"packing": True, "text_noise": 0.1}, "without packing"),
        ({"keep_rate_range": (0, 0.5)}, "above 0 and at most 1"),
        ({"keep_rate_range": (0.5, 0.4)}, "in order"),
    ],
)
def test_arguments_are_checked(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        LavitDataCollator(processor, **arguments)


def test_a_tokenizer_without_end_of_text(processor):
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-text"):
        LavitDataCollator(processor)


LENGTHS = [5, 3, 9, 2, 7]


def rows(lengths=LENGTHS) -> list[TrainingRow]:
    result = []
    for index, length in enumerate(lengths):
        ids = [10 * (index + 1) + position for position in range(length)]
        result.append(TrainingRow(index, [Segment(ids=ids, is_learned=[True] * length)]))
    return result


def samples(count: int = 6) -> list[dict]:
    return [
        {"codes": [list(range(index, 3 * index + 2))], "text": "cat " * (index % 3 + 1), "sample_id": index}
        for index in range(count)
    ]


def test_everything_in_one_sequence():
    batch = join_rows(rows(), pad_token_id=2)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(LENGTHS))
    lengths = sorted(LENGTHS, reverse=True)
    assert batch["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == -100).all(), "the row before does not predict the first id of a row"
    assert torch.equal(batch["labels"][~starts], batch["input_ids"][~starts])
    assert batch["use_cache"] is False, "transformers looks for packed rows only without a cache"


def test_no_sequence_is_longer_than_allowed():
    batch = join_rows(rows(), pad_token_id=2, max_length=10)
    assert batch["position_ids"].tolist() == [[*range(9)], [*range(7), *range(2)], [*range(5), *range(3), 0]]
    assert batch["input_ids"][2, -1] == 2 and batch["labels"][2, -1] == -100, "the filling is a row of its own"
    filled = batch["input_ids"][batch["input_ids"] != 2]
    assert sorted(filled.tolist()) == sorted(index for row in rows() for index in row.ids), "no id is lost"


def test_sequences_are_about_equally_long():
    """Three full sequences and a fourth of one row would be mostly padding."""
    batch = join_rows(rows([10] * 31), pad_token_id=2, max_length=100)
    assert batch["input_ids"].shape == (4, 80)


def test_a_row_longer_than_a_sequence():
    with pytest.raises(ValueError, match="row of 9 ids does not fit into sequences of 8"):
        join_rows(rows(), 2, max_length=8)


def test_lengths_can_be_rounded_up():
    assert join_rows(rows(), 2, multiple=8)["input_ids"].shape == (1, 32)
    assert pad_rows(rows(), 2, multiple=8)["input_ids"].shape == (5, 16)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_length", [None, 40])
def test_packed_rows_do_not_see_one_another(attention, max_length):
    """Same loss and same gradients as with padding."""
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT, attn_implementation=attention)
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    results = []
    for packing in (False, True):
        batch = LavitDataCollator(processor, packing=packing, max_length=max_length)(samples())
        assert batch["input_ids"].shape[0] == (6 if not packing else 1 if max_length is None else 3)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad, model.get_input_embeddings().weight.grad))
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-5)


def test_a_packed_row_has_the_logits_it_has_alone():
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    collator = LavitDataCollator(ImageTextProcessor.from_pretrained(CHECKPOINT), packing=True)
    with torch.no_grad():
        packed = model(**collator(samples())).logits[0]
        alone = [model(**collator([sample])).logits[0] for sample in samples()]
    alone.sort(key=len, reverse=True)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_packing_shrinks_the_batch():
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    padded, packed = (LavitDataCollator(processor, packing=packing)(samples()) for packing in (False, True))
    assert packed["input_ids"].numel() == padded["attention_mask"].sum() < padded["input_ids"].numel()


def test_features_cannot_be_packed():
    from PIL import Image

    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    image = Image.new("RGB", (8, 8))
    collator = LavitDataCollator(processor, packing=True, image_first_probability=1)
    with pytest.raises(ValueError, match="Sample 9 has an image that enters as features.*image_first_probability=0"):
        collator([{"image": image, "text": "a", "sample_id": 9}])
