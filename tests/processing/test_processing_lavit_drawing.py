"""Prompts for drawing, and taking apart what the model wrote."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    pipeline,
)

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.processing.tokenization_lavit import VisualIds, split_ids

V, K = 300, 64
START, END, CODE, IMAGE = V, V + 1, V + 2, 0  # the placeholder has the row of <unk>
AS_RELEASED = {"min_new_tokens": 6, "suppress_tokens": list(range(3, V))}


@pytest.fixture(scope="module")
def processor(checkpoint):
    """The converted processor; it loads a visual tokenizer for discrete images on its own."""
    return ImageTextProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture(scope="module")
def model(checkpoint):
    return LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


class FakeDecoder:
    """A picture as wide as its codes are many; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, codes):
        self.calls += 1
        return SimpleNamespace(images=[Image.new("RGB", (len(image) + 1, 1)) for image in codes])


# Prompts


def test_prompts_end_with_the_image_start(processor, golden, golden_meta):
    prompts = golden_meta["t2i_prompts"]
    inputs = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(inputs["input_ids"][:, :-1], golden["t2i_prompt_ids"])
    assert (inputs["input_ids"][:, -1] == START).all()
    assert torch.equal(inputs["attention_mask"], golden["t2i_attention_mask"])
    nested = processor(text=prompts, text_kwargs={"generation_mode": "image", "padding": True}, return_tensors="pt")
    assert torch.equal(nested["input_ids"], inputs["input_ids"])
    for mode in (None, "text", "interleaved"):
        plain = processor(text=prompts, generation_mode=mode, padding=True, return_tensors="pt")
        assert torch.equal(plain["input_ids"], golden["t2i_prompt_ids"])


def test_image_prompts_enter_as_codes_alone(processor, images, golden):
    text = "<image>it is running"
    inputs = processor(images=images[0], text=text, generation_mode="image", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"][0].tolist() == [*golden["mm_prompt_ids"].tolist(), START]
    assert processor.get_num_image_tokens(inputs["input_ids"]) == [[]]


def test_visual_modes_of_image_prompts(processor, images, golden):
    codes = golden["disc_llm_ids_with_special"][: golden["disc_counts"][0] + 2].tolist()
    options = {"images": images[0], "text": "<image>", "generation_mode": "image"}
    assert processor(**options)["input_ids"] == [[*codes[1:-1], START]]
    assert processor(**options, visual_mode="discrete")["input_ids"] == [[*codes, START]]
    light = processor(**options, visual_mode="continuous")
    assert light["input_ids"] == [[START, *[IMAGE] * 16, END, START]] and "pixel_values" in light
    mixed = processor([images[0]] * 2, "<image><image>", visual_mode=["discrete", "continuous"])
    assert mixed["input_ids"] == [[*codes, START, *[IMAGE] * 16, END]]


def test_drawing_without_a_prompt(processor):
    inputs = processor(text=["", "cat"], generation_mode="image", padding=True, return_tensors="pt")
    assert inputs["input_ids"][0].tolist()[-2:] == [2, START] and inputs["attention_mask"][0].sum() == 1
    assert processor(text="", generation_mode="image")["input_ids"] == [[START]]
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        processor(text="", generation_mode="interleaved")


def test_the_image_start_is_not_truncated(processor):
    full = processor(text="a red bird", generation_mode="image")["input_ids"][0]
    cut = processor(text="a red bird", generation_mode="image", truncation=True, max_length=5)["input_ids"][0]
    assert cut == [*full[:4], START]
    assert processor(text="a", generation_mode="image", truncation=True, max_length=1)["input_ids"] == [[START]]
    inputs = processor(text="a red bird", generation_mode="image", return_offsets_mapping=True)
    assert inputs["offset_mapping"][0][-1] == (10, 10) and len(inputs["offset_mapping"][0]) == len(full)


def test_wrong_generation_modes(processor, images):
    with pytest.raises(ValueError, match="'text', 'image' or 'interleaved', got 'imgae'"):
        processor(text="a", generation_mode="imgae")
    with pytest.raises(ValueError, match="pass `text`"):
        processor(images=images[0], generation_mode="image")
    with pytest.raises(ValueError, match="got 'audio'"):
        processor.post_process_multimodal_output([[1]], generation_mode="audio")


@pytest.mark.parametrize("placed", ["template", "processor", "plain template"])
def test_chats_for_drawing(processor, placed):
    chat = [{"role": "user", "content": [{"type": "text", "text": "a red <image>"}]}]
    mode = {"generation_mode": "image"}
    kwargs = {"processor_kwargs": mode} if placed == "processor" else mode
    template = "{{ messages[0].content[0].text }}" if placed == "plain template" else None
    ids = processor.apply_chat_template(chat, template, tokenize=True, add_generation_prompt=True, **kwargs)
    assert ids == [[*processor.tokenizer.encode("a red <image>"), START]]


def test_rendered_chats_for_drawing(processor):
    chat = [{"role": "user", "content": "a red bird"}]
    options = {"add_generation_prompt": True}
    assert processor.apply_chat_template(chat, generation_mode="image", **options) == "a red bird"
    assert processor.apply_chat_template(chat, generation_mode="text", **options) == "Question: a red bird Answer:"


# The original's numbers, through processor and model


def guidance(model, scale: float, way: str) -> dict:
    """Options of `generate`: guidance in one batch, or transformers' own, with a second pass per token."""
    if way == "batched":
        return {"guidance_scale": scale}
    return {"logits_processor": LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model)])}


WAYS = pytest.mark.parametrize("way", ["batched", "unbatched"])


@WAYS
@pytest.mark.parametrize(("recorded", "scale"), [("t2i_cfg3_ids", 3.0), ("t2i_cfg1_ids", 1.0)])
def test_golden_ids_from_prompts(processor, model, golden, golden_meta, recorded, scale, way):
    prompts = golden_meta["t2i_prompts"]
    inputs = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    options = {**AS_RELEASED, "max_new_tokens": 12, "do_sample": False, **guidance(model, scale, way)}
    output = model.generate(**inputs, generation_mode="image", **options)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], golden[recorded])
    check_codes(processor.post_process_multimodal_output(output, generation_mode="image"), golden[recorded])


@WAYS
def test_golden_ids_from_a_picture_and_text(processor, model, images, golden, way):
    inputs = processor(images[0], "<image>it is running", generation_mode="image", return_tensors="pt")
    options = {**AS_RELEASED, "max_new_tokens": 17, "do_sample": False, **guidance(model, 3.0, way)}
    output = model.generate(**inputs, generation_mode="image", **options)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], golden["mm_cfg3_ids"])
    check_codes(processor.post_process_multimodal_output(output, generation_mode="image"), golden["mm_cfg3_ids"])
    parts = processor.post_process_multimodal_output(output, generation_mode="interleaved")
    assert [part if isinstance(part, str) else len(part) for part in parts[0]] == [4, "it is running", 13]


def check_codes(codes, recorded):
    """Codes are those of the recorded ids before the end; strays (0, 1, 2, V) are dropped."""
    for found, ids in zip(codes, recorded.tolist(), strict=True):
        ids = ids[: ids.index(END)] if END in ids else ids
        assert found.dtype == torch.long and found.tolist() == [index - CODE for index in ids if index >= CODE]


# Taking ids apart


@pytest.mark.parametrize("name", ["t2i_cfg3_ids", "t2i_cfg1_ids", "mm_cfg3_ids"])
@pytest.mark.parametrize("with_prompt", [False, True])
def test_golden_ids_to_codes(processor, golden, name, with_prompt):
    ids = golden[name]
    if with_prompt:
        prompt = golden["t2i_prompt_ids" if name.startswith("t2i") else "mm_prompt_ids"].reshape(len(ids), -1)
        ids = torch.cat([prompt, torch.full((len(ids), 1), START), ids], dim=1)
    check_codes(processor.post_process_multimodal_output(ids, generation_mode="image"), golden[name])


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        ([], []),
        ([5, 6], [("text", [5, 6])]),
        ([START, CODE, CODE + 3, END], [("image", [0, 3])]),
        ([5, START, CODE, END, 6, START, END], [("text", [5]), ("image", [0]), ("text", [6]), ("image", [])]),
        ([START, CODE, CODE + 1], [("image", [0, 1])]),
        ([5, START], [("text", [5]), ("image", [])]),
        ([START, 8, CODE, 1, START, CODE + 1, 2, 9, END, 2, 2], [("image", [0, 1]), ("text", [2, 2])]),
        ([CODE, CODE + 1, 9, START, CODE + 2, END], [("image", [0, 1]), ("text", [9]), ("image", [2])]),
        ([2, CODE, 2, CODE + 1, END, 2], [("text", [2]), ("image", [0, 1]), ("text", [2])]),
        ([START, IMAGE, IMAGE, END, 5], [("features", []), ("text", [5])]),
        ([5, END, 6, IMAGE], [("text", [5, 6])]),
    ],
)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_split_images(tokenizer, ids, runs, kind):
    assert [tuple(run) for run in tokenizer.split_images(kind(ids))] == runs


def test_tokens_are_counted_between_a_start_and_its_end(processor):
    """New ids alone of an image that the prompt had begun have no start, and the last image may have no end."""
    ids = [CODE, CODE, END, 5, START, CODE, END, START, CODE, CODE + 1, END, START, CODE]
    assert processor.get_num_image_tokens([ids, [START, END]]) == [[1, 2], [0]]


def test_split_images_takes_one_sequence(tokenizer):
    with pytest.raises(ValueError, match="one sequence, got 2"):
        tokenizer.split_images([[5], [6]])


def test_split_images_drops_ids_that_do_not_exist(tokenizer):
    """Regression: after bare codes one ended the image, and the codes behind it were lost."""
    runs = tokenizer.split_images([CODE, CODE + 1, 2**31, CODE + 2])
    assert [tuple(run) for run in runs] == [("image", [0, 1, 2])]


@pytest.mark.parametrize("ids", [[1.5], ["5"], [None], [True], [2**70], torch.tensor([0.5]), np.array([0.5])])
def test_what_is_no_id_is_named(tokenizer, ids):
    calls = (tokenizer.decode, tokenizer.split_images, tokenizer.convert_codes_to_ids, tokenizer.convert_ids_to_codes)
    for call in calls:
        with pytest.raises(ValueError, match="is not a"):
            call(ids)


def test_rows_of_rows_are_refused(processor):
    with pytest.raises(ValueError, match="more than two dimensions"):
        processor.post_process_multimodal_output(torch.zeros(1, 1, 2, dtype=torch.long), generation_mode="interleaved")


@given(st.lists(st.sampled_from([8, 1, 2, 9, START, END, CODE, CODE + 1, IMAGE])))
def test_any_ids_can_be_split(ids):
    runs = split_ids(ids, VisualIds(START, END, range(CODE, CODE + K), IMAGE), {1, 2})
    for run in runs:
        assert run.kind != "text" or (run.ids and max(run.ids) < V)
        assert run.kind != "image" or all(0 <= code < K for code in run.ids)
    assert not any(first.kind == second.kind == "text" for first, second in pairwise(runs))


def test_text_output(processor):
    ids = processor.tokenizer.encode("a cat")
    row = [2, START, CODE, END, *ids, 2]
    assert processor.post_process_multimodal_output([row, row]) == ["a cat"] * 2
    assert processor.post_process_multimodal_output(torch.tensor([row]), generation_mode="text") == ["a cat"]
    (kept,) = processor.post_process_multimodal_output([row], skip_special_tokens=False)
    assert "<visual_0>" in kept


def test_the_last_image_counts(processor):
    rows = [
        [2, 5, START, CODE + 1, END, 6, START, CODE + 2, CODE + 3, END],
        [START, IMAGE, END, 5, 6, 7, START, CODE + 4, END, 2],
        [2, 2, 2, 2, 2, 2, 2, 5, START, END],
        [2, 2, 2, 2, 2, 2, 2, 5, 6, 7],
    ]
    for ids in (rows, torch.tensor(rows), np.array(rows), [torch.tensor(row) for row in rows]):
        codes = processor.post_process_multimodal_output(ids, generation_mode="image")
        assert [image.tolist() for image in codes] == [[2, 3], [4], [], []]
    (single,) = processor.post_process_multimodal_output(torch.tensor(rows[0]), generation_mode="image")
    assert single.tolist() == [2, 3]


def test_images_in_one_call_of_the_pixel_decoder(processor):
    decoder, rows = FakeDecoder(), [[5, START, CODE, CODE, END], [START, CODE, END, 2, 2]]
    images = processor.post_process_multimodal_output(rows, generation_mode="image", pixel_decoder=decoder)
    assert [image.width for image in images] == [3, 2] and decoder.calls == 1
    with pytest.raises(ValueError, match=r"1 image\(s\) for 2"):
        processor.post_process_multimodal_output(
            rows, generation_mode="image", pixel_decoder=lambda codes: SimpleNamespace(images=[0])
        )


def test_interleaved_output(processor):
    encode = processor.tokenizer.encode
    rows = [
        [2, 2, *encode("a cat"), START, CODE, CODE + 1, END, *encode(" on the"), START, CODE + 2, END, 2],
        [START, IMAGE, END, *encode("a"), 2, 2],
        [2, 2],
    ]
    parts = processor.post_process_multimodal_output(rows, generation_mode="interleaved")
    assert [[part if isinstance(part, str) else part.tolist() for part in row] for row in parts] == [
        ["a cat", [0, 1], " on the", [2]],
        ["a"],
        [],
    ]
    decoder = FakeDecoder()
    drawn = processor.post_process_multimodal_output(rows, generation_mode="interleaved", pixel_decoder=decoder)
    assert [part if isinstance(part, str) else part.width for part in drawn[0]] == ["a cat", 3, " on the", 2]
    assert decoder.calls == 1
    kept = processor.post_process_multimodal_output(rows, generation_mode="interleaved", skip_special_tokens=False)
    assert kept[2] == ["</s></s>"]


def test_a_pixel_decoder_of_the_processor_s_own(checkpoint, tmp_path):
    decoder = FakeDecoder()
    processor = AutoProcessor.from_pretrained(checkpoint, pixel_decoder=decoder)
    (image,) = processor.post_process_multimodal_output([[START, CODE, END]], generation_mode="image")
    assert image.width == 2
    assert copy.copy(processor).pixel_decoder is decoder
    processor.save_pretrained(tmp_path)
    assert "pixel_decoder" not in "".join(file.read_text() for file in tmp_path.glob("*.json"))
    assert AutoProcessor.from_pretrained(tmp_path).pixel_decoder is None


def test_any_to_any_pipeline(checkpoint, model, images, monkeypatch):
    """transformers asks for torchvision there, which the PIL backend does not need."""
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *args, **kwargs: None)
    processor = AutoProcessor.from_pretrained(checkpoint, pixel_decoder=FakeDecoder())
    pipe = pipeline("any-to-any", model=model, processor=processor)
    (answer,) = pipe(text="<image>Question: who? Answer:", images=images[0], max_new_tokens=3)
    assert answer["generated_text"].startswith("<image>Question: who? Answer:")
    chat = [{"role": "user", "content": [{"type": "text", "text": "a red bird"}]}]
    with pytest.raises(ValueError, match=r'processor_kwargs=\{"generation_mode": "image"\}'):
        pipe(text="a red bird", generation_mode="image", max_new_tokens=3)
    options = {"generation_mode": "image", "processor_kwargs": {"generation_mode": "image"}, "max_new_tokens": 3}
    for text in ("a red bird", ["a red bird", "cat"], chat):
        for drawn in pipe(text=text, **options):
            assert isinstance(drawn["generated_image"], Image.Image)


def test_image_text_to_text_pipeline(processor, model, images):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    inputs = processor(images=images[0], text="<image>Question: who? Answer:", return_tensors="pt")
    new_ids = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(new_ids, skip_special_tokens=True)[0]
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "who?"}]}]
    for arguments in ({"images": images[0], "text": "<image>Question: who? Answer:"}, {"text": chat}):
        (answer,) = pipe(**arguments, max_new_tokens=4, return_full_text=False)
        assert expected.strip() and answer["generated_text"].strip() == expected.strip()
