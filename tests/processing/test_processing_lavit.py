"""The processor: its two forms, its checks, chat templates, and what saving keeps."""

import copy
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Blip2VisionConfig

from lavit_hf import (
    ImageTextProcessor,
    LavitForConditionalGeneration,
    LavitImageProcessorPil,
    LavitTokenizer,
    LavitVisualTokenizer,
    LavitVisualTokenizerConfig,
)

DATA = Path(__file__).parents[1] / "data" / "tiny-original"
IMAGES = [Image.open(DATA / "images" / f"{i}.png") for i in range(3)]
PATHS = [str(DATA / "images" / f"{i}.png") for i in range(3)]
GOLDEN = load_file(DATA / "golden.safetensors")
META = json.loads((DATA / "golden_meta.json").read_text())
V, K, N = 300, 64, 16
START, END, IMAGE = V, V + 1, V + 2 + K


@dataclass
class FakeOutput:
    codes: torch.Tensor | None
    num_tokens: torch.Tensor


class FakeVisualTokenizer(torch.nn.Module):
    """Gives the golden's images the golden's codes; remembers how many images it was given in each call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000))
        self.calls = []

    device = property(lambda self: self.weight.device)
    dtype = property(lambda self: self.weight.dtype)

    def counts(self, pixel_values, counts):
        known = GOLDEN["pixel_values"].to(pixel_values.dtype)
        matches = [(known - image).abs().flatten(1).amax(1).argmin().item() for image in pixel_values]
        return torch.tensor([counts[i] for i in matches]), matches

    def encode(self, pixel_values):
        self.calls.append(pixel_values.shape[0])
        assert pixel_values.dtype == self.dtype and not torch.is_grad_enabled()
        counts, matches = self.counts(pixel_values, META["disc_counts"])
        codes = GOLDEN["disc_code_ids"].split(META["disc_counts"])
        return FakeOutput(torch.cat([codes[i] for i in matches]), counts)


@pytest.fixture(scope="module")
def tokenizer() -> LavitTokenizer:
    return LavitTokenizer.from_sentencepiece(DATA / "language_model" / "tokenizer.model", codebook_size=K)


@pytest.fixture
def processor(tokenizer) -> ImageTextProcessor:
    image_processor = LavitImageProcessorPil(size={"height": 56, "width": 56})
    return ImageTextProcessor(image_processor, tokenizer, image_seq_length=N)


@pytest.fixture
def tokenizing(processor) -> ImageTextProcessor:
    processor.visual_tokenizer = FakeVisualTokenizer()
    return processor


@pytest.fixture(scope="module")
def small_checkpoint(tokenizer, tmp_path_factory) -> Path:
    """A directory with a processor and a visual tokenizer, as a converted one has."""
    path = tmp_path_factory.mktemp("checkpoint")
    vision = Blip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = LavitVisualTokenizerConfig(
        vision_config=vision,
        merger_num_layers=1,
        merger_num_heads=2,
        merger_intermediate_size=32,
        codebook_size=K,
        codebook_dim=8,
    )
    torch.manual_seed(0)
    LavitVisualTokenizer(config).save_pretrained(path)
    image_processor = LavitImageProcessorPil(size={"height": 56, "width": 56})
    ImageTextProcessor(image_processor, tokenizer, image_seq_length=N).save_pretrained(path)
    return path


def image_ids(count: int) -> list[int]:
    return [START, *[IMAGE] * count, END]


# The two forms


def test_continuous_form(processor, tokenizer):
    inputs = processor(images=IMAGES[0], text="<image>Question: what is it? Answer:", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["input_ids"].tolist() == [image_ids(N) + tokenizer.encode("Question: what is it? Answer:")]
    torch.testing.assert_close(inputs["pixel_values"], GOLDEN["pixel_values"][:1], atol=1e-6, rtol=0)
    assert processor.get_num_image_tokens(inputs["input_ids"]) == [[N]]


def test_continuous_images_are_left_to_the_model(processor, tokenizer):
    """Whether the processor has a visual tokenizer makes no difference."""
    options = {"images": IMAGES, "text": ["<image>a<image>", "no image", "<image>"], "padding": True}
    expected = processor(**options, return_tensors="pt")
    processor.visual_tokenizer = FakeVisualTokenizer()
    inputs = processor(**options, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values"]  # in this order
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert processor.get_num_image_tokens(inputs["input_ids"]) == [[N, N], [], [N]]
    assert not processor.visual_tokenizer.calls
    assert inputs["input_ids"][0].tolist() == image_ids(N) + tokenizer.encode("a") + image_ids(N)
    assert inputs.to(torch.float64)["pixel_values"].dtype == torch.float64
    assert inputs["input_ids"].dtype == torch.long


def test_discrete_form(tokenizing):
    inputs = tokenizing(images=IMAGES, text="<image><image><image>", visual_mode="discrete", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(inputs["input_ids"][0], GOLDEN["disc_llm_ids_with_special"])
    assert tokenizing.visual_tokenizer.calls == [3]
    assert tokenizing.get_num_image_tokens(inputs["input_ids"]) == [META["disc_counts"]]


@pytest.mark.parametrize(
    ("budget", "counts"),
    [
        ({"num_image_tokens": 4}, [4, 4, 4]),
        ({"num_image_tokens": [1, 2, N]}, [1, 2, N]),
        ({"num_image_tokens": [[1, 2], [3]]}, [1, 2, 3]),
        ({"num_image_tokens": np.int64(4)}, [4, 4, 4]),
        ({"keep_rate": 0.25}, [4, 4, 4]),
        ({"keep_rate": 0.001}, [1, 1, 1]),
        ({"max_total_image_tokens": 7}, [4, 3, 7]),
        ({"max_total_image_tokens": 1000}, [N, N, N]),
    ],
)
def test_budgets(processor, budget, counts):
    """As many placeholders as tokens, known before anything is encoded."""
    inputs = processor(images=IMAGES, text=["<image>a<image>", "<image>"], padding=True, return_tensors="pt", **budget)
    assert processor.get_num_image_tokens(inputs["input_ids"]) == [counts[:2], counts[2:]]
    assert inputs["num_image_tokens"].tolist() == counts and len(inputs["pixel_values"]) == 3
    arrays = processor(images=IMAGES, text=["<image>a<image>", "<image>"], padding=True, return_tensors="np", **budget)
    assert arrays["num_image_tokens"].tolist() == counts


def test_servers_learn_the_number_of_placeholders(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(50, 60), (7, 7)], num_image_tokens=[5, 2])
    assert counts["num_image_tokens"] == [5, 2] and counts["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens(image_sizes=[(50, 60)], keep_rate=0.5)["num_image_tokens"] == [8]
    assert processor._get_num_multimodal_tokens(image_sizes=[(50, 60)])["num_image_tokens"] == [N]
    budgeted = {"num_image_tokens": torch.tensor([1, 3])}
    assert processor.replace_image_token(budgeted, 1) == "<img>" + "<image>" * 3 + "</img>"
    assert processor.replace_image_token({}, 0) == "<img>" + "<image>" * N + "</img>"


def test_budgets_of_discrete_images(small_checkpoint):
    processor = ImageTextProcessor.from_pretrained(small_checkpoint)
    inputs = processor(
        images=IMAGES,
        text="<image><image><image>",
        visual_mode=["discrete", "continuous", "discrete"],
        num_image_tokens=[2, 3, 5],
        return_tensors="pt",
    )
    assert processor.get_num_image_tokens(inputs["input_ids"]) == [[2, 3, 5]]
    assert inputs["num_image_tokens"].tolist() == [3]  # of the continuous image, whose pixels are here
    output = processor.visual_tokenizer.encode(GOLDEN["pixel_values"], num_tokens=[2, 3, 5])
    codes = processor.tokenizer.convert_codes_to_ids(output.codes)
    assert inputs["input_ids"][0, 1:3].tolist() == codes[:2].tolist()
    bare = processor(images=IMAGES[:1], text="<image>", generation_mode="image", num_image_tokens=2)
    assert bare["input_ids"] == [[*codes[:2].tolist(), START]]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"num_image_tokens": 0}, f"1 to {N} tokens"),
        ({"num_image_tokens": N + 1}, f"1 to {N} tokens"),
        ({"num_image_tokens": [1, 2]}, "2 numbers of tokens for 3 images"),
        ({"num_image_tokens": 2.5}, "an integer"),
        ({"num_image_tokens": 2, "keep_rate": 0.5}, "Give one of `num_image_tokens`, `keep_rate`"),
        ({"keep_rate": 0}, "more than 0"),
        ({"max_total_image_tokens": 1}, "Prompt 0 has 2 images"),
    ],
)
def test_wrong_budgets(processor, budget, message):
    with pytest.raises(ValueError, match=message):
        processor(images=IMAGES, text=["<image>a<image>", "<image>"], padding=True, **budget)


@pytest.mark.parametrize(
    "modes", [["discrete", "continuous", "discrete"], [["discrete"], [], ["continuous", "discrete"]]]
)
def test_mode_per_image(tokenizing, modes):
    inputs = tokenizing(
        images=[[IMAGES[0]], [], [IMAGES[1], IMAGES[2]]],
        text=["<image>", "x", "<image> and <image>"],
        visual_mode=modes,
        padding=True,
        return_tensors="pt",
    )
    torch.testing.assert_close(inputs["pixel_values"], GOLDEN["pixel_values"][1:2], atol=1e-6, rtol=0)
    assert tokenizing.visual_tokenizer.calls == [2]
    ids = GOLDEN["disc_llm_ids_with_special"].split([count + 2 for count in META["disc_counts"]])
    assert torch.equal(inputs["input_ids"][0, -len(ids[0]) :], ids[0])
    assert torch.equal(inputs["input_ids"][2, -len(ids[2]) :], ids[2])
    assert tokenizing.get_num_image_tokens(inputs["input_ids"])[2] == [N, META["disc_counts"][2]]


def test_a_discrete_image_beside_a_continuous_one(small_checkpoint):
    processor = AutoProcessor.from_pretrained(small_checkpoint)
    inputs = processor(IMAGES[:2], "<image><image>", visual_mode=["discrete", "continuous"], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 1
    torch.testing.assert_close(inputs["pixel_values"], GOLDEN["pixel_values"][1:2], atol=1e-6, rtol=0)
    assert processor.get_num_image_tokens(inputs["input_ids"])[0][1] == N


def test_an_image_may_keep_nothing(tokenizing, monkeypatch):
    monkeypatch.setitem(META, "disc_counts", [0, 23, 0])
    assert [len(ids) for ids in tokenizing.tokenize_images(IMAGES)] == [2, 25, 2]
    inputs = tokenizing(images=IMAGES[0], text="<image>", visual_mode="discrete", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[START, END]]


def test_dtype_of_the_visual_tokenizer_is_used(tokenizing):
    tokenizing.visual_tokenizer.to(torch.bfloat16)  # which checks the dtype of what it is given
    assert len(tokenizing.tokenize_images(IMAGES[0])) == 1
    assert tokenizing.visual_tokenizer.calls == [1]
    assert tokenizing(IMAGES[0], "<image>", return_tensors="np")["pixel_values"].dtype == np.float32


def test_tokenize_images(tokenizing, small_checkpoint):
    expected = GOLDEN["disc_llm_ids_with_special"].split([count + 2 for count in META["disc_counts"]])
    for images in (IMAGES, PATHS, [[IMAGES[0]], IMAGES[1:]]):
        ids = tokenizing.tokenize_images(images)
        assert all(torch.equal(a, b) for a, b in zip(ids, expected, strict=True))
    loaded = ImageTextProcessor.from_pretrained(small_checkpoint)
    ids = loaded.tokenize_images(IMAGES)
    assert loaded.get_visual_tokenizer().dtype == torch.float32
    assert loaded.get_visual_tokenizer() is loaded.get_visual_tokenizer()
    again = AutoProcessor.from_pretrained(
        small_checkpoint, visual_tokenizer=LavitVisualTokenizer.from_pretrained(small_checkpoint, dtype=torch.float32)
    )
    assert all(torch.equal(a, b) for a, b in zip(ids, again.tokenize_images(IMAGES), strict=True))


def test_discrete_needs_a_visual_tokenizer(processor):
    with pytest.raises(ValueError, match="visual tokenizer"):
        processor(IMAGES[0], "<image>", visual_mode="discrete")


def test_a_visual_tokenizer_must_fit(processor, small_checkpoint):
    visual_tokenizer = LavitVisualTokenizer.from_pretrained(small_checkpoint)
    visual_tokenizer.config.codebook_size = 5
    with pytest.raises(ValueError, match="codebook_size is 5"):
        AutoProcessor.from_pretrained(small_checkpoint, visual_tokenizer=visual_tokenizer)
    with pytest.raises(ValueError, match="codebook_size is 5"):
        ImageTextProcessor(
            processor.image_processor, processor.tokenizer, image_seq_length=N, visual_tokenizer=visual_tokenizer
        )
    processor.visual_tokenizer = visual_tokenizer
    with pytest.raises(ValueError, match="codebook_size is 5"):
        processor.tokenize_images(IMAGES)


def test_a_whole_model_may_be_given(processor, small_checkpoint):
    whole = torch.nn.Module()
    whole.visual_tokenizer = FakeVisualTokenizer()
    processor.visual_tokenizer = whole
    assert processor.get_visual_tokenizer() is processor.visual_tokenizer is whole.visual_tokenizer
    loaded = AutoProcessor.from_pretrained(small_checkpoint, visual_tokenizer=whole)
    assert loaded.visual_tokenizer is whole.visual_tokenizer
    for wrong in (str(small_checkpoint), small_checkpoint, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="must be a LavitVisualTokenizer or a model that has one"):
            AutoProcessor.from_pretrained(small_checkpoint, visual_tokenizer=wrong)


def test_a_directory_without_a_visual_tokenizer(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass `visual_tokenizer=`"):
        loaded(IMAGES[0], "<image>", visual_mode="discrete")


# Goldens


def test_golden_prompts(processor):
    for prompts, ids, mask in (
        ([f"Question: {q} Answer:" for q in META["questions"]], "vqa_prompt_ids", "vqa_prompt_text_mask"),
        (META["caption_prompts"], "caption_prompt_input_ids", "caption_prompt_text_mask"),
        (META["t2i_prompts"], "t2i_prompt_ids", "t2i_prompt_mask"),
    ):
        inputs = processor(text=prompts, padding=True, return_tensors="pt")
        assert torch.equal(inputs["input_ids"], GOLDEN[ids])
        assert torch.equal(inputs["attention_mask"], GOLDEN[mask])


# Layouts, counts, padding


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        tuple(IMAGES),
        PATHS,
        [[IMAGES[0]], [IMAGES[1], IMAGES[2]]],
        [[PATHS[0]], PATHS[1:]],
        [np.array(image) for image in IMAGES],
    ],
)
def test_image_layouts(processor, images):
    inputs = processor(images=images, text=["<image>", "<image>, <image>"], padding=True, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], GOLDEN["pixel_values"], atol=1e-6, rtol=0)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [N, 2 * N]


def test_batched_tensor_of_images(processor):
    images = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    assert processor(images, ["<image>", "<image>"], return_tensors="pt")["pixel_values"].shape[0] == 2


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, "<image>", r"found 1 \(1 in prompt 0\), but got 0 image"),
        ([], "<image>", "but got 0 image"),
        (IMAGES[0], "no placeholder", "found 0 .*but got 1 image"),
        (IMAGES[:2], ["<image>", "a"], r"\(1 in prompt 0, 0 in prompt 1\), but got 2 image"),
        ([[IMAGES[0]], [IMAGES[1]]], ["<image><image>", ""], "Prompt 1 is empty"),
        ([[IMAGES[0]], [IMAGES[1]]], ["<image><image>", "a"], "prompt 0 has 2, but got 1 image"),
        ([[IMAGES[0]], [IMAGES[1]]], ["<image>", "a"], "prompt 1 has 0, but got 1 image"),
        ([[IMAGES[0]]], ["<image>", "<image>"], "1 lists of images for 2 prompts"),
        (None, "", "Prompt 0 is empty"),
        (None, [], "empty list"),
        (None, ["a", 3], "string or a list of strings"),
        (None, 3, "string or a list of strings"),
        (None, None, "needs images, text or both"),
        ([None], "<image>", "must be a PIL image"),
    ],
)
def test_inputs_that_do_not_fit(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_wrong_modes(processor):
    with pytest.raises(ValueError, match="'continuous' or 'discrete'"):
        processor(IMAGES[0], "<image>", visual_mode="dicsrete")
    with pytest.raises(ValueError, match="got 'bare'"):  # what drawing does by default is no mode to ask for
        processor(IMAGES[0], "<image>", visual_mode=["bare"])
    with pytest.raises(ValueError, match="2 visual modes for 1 image"):
        processor(IMAGES[0], "<image>", visual_mode=["continuous"] * 2)
    with pytest.raises(ValueError, match="'continuous' or 'discrete'"):
        ImageTextProcessor(processor.image_processor, processor.tokenizer, visual_mode="?")
    with pytest.raises(ValueError, match="no videos"):
        processor(text="a", videos=[1])


def test_one_modality_alone(processor):
    assert set(processor(images=IMAGES, return_tensors="pt")) == {"pixel_values"}
    assert set(processor(text="a cat", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert processor(text="a cat")["input_ids"] == [processor.tokenizer.encode("a cat")]
    assert processor(images=[], text="a cat")["input_ids"] == [processor.tokenizer.encode("a cat")]


def test_padding(processor):
    text, images = ["<image>a", "<image>a longer text"], IMAGES[:2]
    rows = processor(images, text)["input_ids"]
    left = processor(images, text, padding=True, return_tensors="pt")
    right = processor(images, text, padding=True, padding_side="right", return_tensors="pt")
    gap = len(rows[1]) - len(rows[0])
    assert left["input_ids"][0].tolist() == [2] * gap + rows[0]
    assert left["attention_mask"][0].tolist() == [0] * gap + [1] * len(rows[0])
    assert right["input_ids"][0].tolist() == rows[0] + [2] * gap
    wide = processor(images, text, padding=True, pad_to_multiple_of=64, return_tensors="pt")
    assert wide["input_ids"].shape[1] % 64 == 0
    fixed = processor(images, text, padding="max_length", max_length=100, return_tensors="pt")
    assert fixed["input_ids"].shape == (2, 100)
    assert isinstance(processor(images, text, padding=True, return_tensors="np")["input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="padding"):
        processor(images, text, return_tensors="pt")
    grouped = processor(images, text, text_kwargs={"padding": True}, common_kwargs={"return_tensors": "pt"})
    assert torch.equal(grouped["input_ids"], left["input_ids"])


def test_truncation_cuts_text_but_never_images(processor):
    full = processor(IMAGES[0], "<image>a longer text")["input_ids"][0]
    assert processor(IMAGES[0], "<image>a longer text", truncation=True)["input_ids"] == [full]
    cut = processor(IMAGES[0], "<image>a longer text", truncation=True, max_length=20)
    assert cut["input_ids"] == [full[:20]] and cut["attention_mask"] == [[1] * 20]
    with pytest.raises(ValueError, match="Truncating prompt 1 from .* to `max_length=10`.*cut an image"):
        processor(IMAGES[0], ["a longer text", "<image>a"], truncation=True, max_length=10)
    with pytest.raises(ValueError, match="cut an image"):
        processor(IMAGES[0], "a longer text<image>", truncation=True, max_length=20)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.truncation_side = "left"
    inputs = processor(IMAGES[0], "a longer text<image>", truncation=True, max_length=20)
    assert inputs["input_ids"][0][-18:] == image_ids(N)


@pytest.mark.parametrize("name", ["return_overflowing_tokens", "is_split_into_words", "return_length"])
def test_unsupported_arguments_are_errors(processor, name):
    with pytest.raises(ValueError, match=name):
        processor(text="a", **{name: True})


@given(parts=st.lists(st.text(alphabet="ab <>\n\u2581/simge_1"), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_segments_stand_alone(tokenizer, parts):
    image_processor = LavitImageProcessorPil(size={"height": 14, "width": 14})
    processor = ImageTextProcessor(image_processor, tokenizer, image_seq_length=1)
    prompt = "<image>".join(parts)
    if not prompt:
        return
    expected: list[int] = []
    for index, part in enumerate(prompt.split("<image>")):
        expected += (image_ids(1) if index else []) + tokenizer.encode(part)
    images = [Image.new("RGB", (2, 2))] * prompt.count("<image>")
    inputs = processor(images or None, prompt, return_offsets_mapping=True)
    assert inputs["input_ids"] == [expected]
    # offsets count characters of the prompt with the names of the image tokens in place of the placeholders
    expanded = prompt.replace("<image>", "<img><image></img>").replace("\u2581", " ")
    for index, (start, end) in zip(expected, inputs["offset_mapping"][0], strict=True):
        if index >= V:
            assert start == end
        elif not 3 <= index < 259:  # a byte's offsets are those of its character
            piece = tokenizer.convert_ids_to_tokens(index).replace("\u2581", " ")
            assert piece.endswith(expanded[start:end]) or piece == " "  # the dummy space has the next character's


@pytest.mark.parametrize("typed", ["</img>", "<img>", "<visual_7>", "</s>", "<s>", "<unk>", "<Image>", "< image>"])
def test_only_the_placeholder_is_control(processor, typed):
    ids = processor(text=f"a {typed} b")["input_ids"][0]
    assert not set(ids) & {0, 1, 2, *range(V, IMAGE + 1)}


# Chats


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text_part(text):
    return {"type": "text", "text": text}


PICTURE = {"type": "image", "image": IMAGES[0]}


@pytest.mark.parametrize(
    ("messages", "generation", "expected"),
    [
        ([user(PICTURE, text_part("what is it?"))], True, "<image>Question: what is it? Answer:"),
        ([user(PICTURE, text_part("what is it?"))], False, "<image>Question: what is it?"),
        ([user(text_part("what is it?"), PICTURE)], True, "Question: what is it?<image> Answer:"),
        ([user(PICTURE)], True, "<image>"),
        ([{"role": "user", "content": "who?"}], True, "Question: who? Answer:"),
        ([user(PICTURE), {"role": "assistant", "content": "a cat"}], False, "<image>a cat"),
        (
            [user(PICTURE, text_part("who?")), {"role": "assistant", "content": [text_part("a cat")]}],
            False,
            "<image>Question: who? Answer: a cat",
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                user(text_part("who?")),
                {"role": "assistant", "content": "a cat"},
                user(text_part("where?")),
            ],
            True,
            "Be brief. Question: who? Answer: a cat Question: where? Answer:",
        ),
        ([user(text_part("a"), text_part("b"))], True, "Question: a b Answer:"),
        ([user(text_part("  spaces kept ")), user(PICTURE)], True, "Question:   spaces kept <image>"),
    ],
)
def test_default_chat_template(processor, messages, generation, expected):
    assert processor.apply_chat_template(messages, add_generation_prompt=generation) == expected


def test_chat_template_refuses_other_media(processor):
    with pytest.raises(Exception, match="not video"):
        processor.apply_chat_template([user({"type": "video", "path": "x.mp4"})])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": IMAGES[0]},
        {"type": "image", "image": PATHS[0]},
        {"type": "image", "path": PATHS[0]},
        {"type": "image", "url": PATHS[0]},
        {"type": "image_url", "image_url": {"url": PATHS[0]}},
    ],
)
def test_chat_equals_the_prompt(processor, part):
    expected = processor(IMAGES[0], "<image>Question: what is it? Answer:", return_tensors="pt")
    chat = [user(part, text_part("what is it?"))]
    options = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, return_dict=True, **options)
    assert set(inputs) == set(expected)
    for name in expected:
        assert torch.equal(inputs[name], expected[name])
    assert torch.equal(processor.apply_chat_template(chat, **options), expected["input_ids"])


def test_batched_chats(tokenizing):
    chats = [
        [user(PICTURE, text_part("what is it?"))],
        [user(text_part("who?"))],
        [user({"type": "image", "path": PATHS[1]}, {"type": "image", "path": PATHS[2]}, text_part("same?"))],
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = tokenizing.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)
    assert tokenizing.get_num_image_tokens(inputs["input_ids"]) == [[N], [], [N, N]]
    torch.testing.assert_close(inputs["pixel_values"], GOLDEN["pixel_values"], atol=1e-6, rtol=0)
    discrete = tokenizing.apply_chat_template(
        chats, processor_kwargs={"padding": True, "visual_mode": "discrete"}, **options
    )
    assert set(discrete) == {"input_ids", "attention_mask"}


FORGERIES = [
    [text_part("<image>")],
    [text_part("a<image>b</img><visual_3></s>")],
    [text_part("<ima"), text_part("ge>")],
    [text_part("<"), text_part("image>")],
    [text_part("<im<image>age>")],
    [text_part("\U000f0000image>")],
    [text_part("\U000f0000<image>\U000f0001")],
    [text_part("<image>\U000f0000"), text_part("\U000f0001<image>")],
]


@pytest.mark.parametrize("parts", FORGERIES)
@pytest.mark.parametrize("sanitize", [False, True])
def test_placeholders_typed_in_a_chat_are_text(processor, parts, sanitize):
    """Also when the template glues the pieces together."""
    glue = "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    typed = "".join(part["text"] for part in parts)
    for template, expected_text in ((glue, typed), (None, f"Question: {' '.join(p['text'] for p in parts)}")):
        ids = processor.apply_chat_template(
            [user(PICTURE, *parts)], template, tokenize=True, sanitize_control_tokens=sanitize
        )[0]
        assert ids == image_ids(N) + processor.tokenizer.encode(expected_text)


def test_placeholders_in_strings_template_variables_and_tools_are_text(processor):
    chat = [{"role": "system", "content": "<image>"}, {"role": "user", "content": "a <image>"}]
    ids = processor.apply_chat_template(chat, tokenize=True)[0]
    assert ids == processor.tokenizer.encode("<image> Question: a <image>")
    template = "{{ messages[0].name }}{{ style }}{{ documents[0].text }}"
    ids = processor.apply_chat_template(
        [{"role": "user", "name": "<image>", "content": "a"}],
        template,
        tokenize=True,
        style="<image>",
        sanitize_control_tokens=True,
        documents=[{"title": "", "text": "<image>"}],
    )[0]
    assert ids == processor.tokenizer.encode("<image>" * 3)


@given(text=st.text(alphabet="<image>/\U000f0000\U000f0001\U000f0002 x", min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_chat_text_is_kept_exactly(tokenizer, text):
    processor = ImageTextProcessor(LavitImageProcessorPil(), tokenizer)
    ids = processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)[0]
    assert ids == tokenizer.encode(f"Question: {text}")


def test_chats_do_not_reach_into_other_calls(processor):
    """What hides typed placeholders in a chat is gone when it is done, and is no argument of a call."""
    chat = [user(text_part("a <image> b"))]
    processor.apply_chat_template(chat, tokenize=True)
    with pytest.raises(Exception, match="not video"):
        processor.apply_chat_template(chat, "{{ raise_exception('not video') }}", tokenize=True)
    assert processor(text="\U000f0000", return_tensors="np")["input_ids"].tolist() == [
        processor.tokenizer.encode("\U000f0000")
    ]
    with pytest.raises(ValueError, match="requires `tokenize=True`"):
        processor.apply_chat_template(chat, sanitize_control_tokens=True)


def test_a_chat_is_not_changed(processor):
    chat = [user({"type": "image", "path": PATHS[0]}, text_part("a <image>"))]
    before = copy.deepcopy(chat)
    processor.apply_chat_template(chat, tokenize=True)
    assert chat == before


def test_assistant_mask(processor):
    chats = [
        [user(PICTURE, text_part("who <is> it?")), {"role": "assistant", "content": "a cat on the"}],
        [user(text_part("x")), {"role": "assistant", "content": "the"}],
    ]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert "offset_mapping" not in inputs
    for row, mask, answer in zip(inputs["input_ids"], inputs["assistant_masks"], ("a cat on the", "the"), strict=True):
        chosen = row[mask.bool()].tolist()
        assert processor.decode(chosen).strip() == answer


def test_mm_token_type_ids(processor):
    inputs = processor(IMAGES[0], "<image>a", return_mm_token_type_ids=True)
    assert inputs["mm_token_type_ids"] == [[0, *[1] * N, 0, 0]]
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (5, 5)])
    assert tokens["num_image_tokens"] == [N, N] and tokens["num_image_patches"] == [1, 1]
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()
    assert processor.replace_image_token({}, 0) == "<img>" + "<image>" * N + "</img>"


# Saving and copying


def files(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir() if file.suffix not in (".safetensors", ".py")}


def test_numpy_integers(processor, tmp_path):
    """They compute like others, and what cannot be written to a file never gets into the processor."""
    own = ImageTextProcessor(processor.image_processor, processor.tokenizer, image_seq_length=np.int64(N))
    own.save_pretrained(tmp_path)
    assert ImageTextProcessor.from_pretrained(tmp_path).image_seq_length == N
    options = {"max_length": 40, "padding": "max_length", "pad_to_multiple_of": 8, "truncation": True}
    numbers = {**options, "max_length": np.int64(40), "pad_to_multiple_of": np.int64(8)}
    expected, found = (own(images=PATHS[0], text="<image>a", return_tensors="pt", **o) for o in (options, numbers))
    assert found["input_ids"].shape == (1, 40) and all(torch.equal(found[name], expected[name]) for name in expected)
    for bad in (16.0, "16", None):
        with pytest.raises(TypeError):
            ImageTextProcessor(processor.image_processor, processor.tokenizer, image_seq_length=bad)


def test_save_and_load_is_lossless(processor, tmp_path):
    processor.visual_mode = "discrete"
    processor.chat_template = "{{ messages[0].content }}"
    processor.save_pretrained(tmp_path / "a")
    loaded = AutoProcessor.from_pretrained(tmp_path / "a")
    assert type(loaded) is ImageTextProcessor
    assert (loaded.visual_mode, loaded.image_seq_length) == ("discrete", N)
    assert loaded.chat_template == processor.chat_template
    loaded.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "b") == files(tmp_path / "a")
    assert loaded.to_dict() == processor.to_dict()


def test_auto_classes(small_checkpoint):
    assert type(AutoTokenizer.from_pretrained(small_checkpoint)) is LavitTokenizer
    assert type(AutoImageProcessor.from_pretrained(small_checkpoint, backend="pil")) is LavitImageProcessorPil
    assert type(AutoProcessor.from_pretrained(small_checkpoint)) is ImageTextProcessor


def test_own_arguments_of_from_pretrained_do_not_leak(small_checkpoint, tmp_path):
    visual_tokenizer = LavitVisualTokenizer.from_pretrained(small_checkpoint)
    processor = AutoProcessor.from_pretrained(
        small_checkpoint, visual_tokenizer=visual_tokenizer, visual_mode="discrete", image_seq_length=N
    )
    assert processor.visual_tokenizer is visual_tokenizer and processor.visual_mode == "discrete"
    for part in (processor.tokenizer.init_kwargs, processor.image_processor.to_dict()):
        assert not {"visual_tokenizer", "visual_mode", "image_seq_length"} & set(part)
    processor.save_pretrained(tmp_path)
    assert "visual_tokenizer" not in "".join(files(tmp_path).values())
    assert not list(tmp_path.glob("*.safetensors"))
    assert AutoProcessor.from_pretrained(tmp_path).visual_tokenizer is None
    with pytest.raises(ValueError, match="'continuous' or 'discrete'"):
        AutoProcessor.from_pretrained(small_checkpoint, visual_mode="other")


def test_visual_tokenizer_comes_from_the_same_place(small_checkpoint, monkeypatch):
    seen = {}

    def from_pretrained(path, **kwargs):
        seen.update(path=path, **kwargs)
        return FakeVisualTokenizer()

    monkeypatch.setattr(LavitVisualTokenizer, "from_pretrained", from_pretrained)
    processor = AutoProcessor.from_pretrained(small_checkpoint, cache_dir="somewhere", token="secret", revision="v1")
    assert not seen
    processor.tokenize_images(IMAGES)
    processor.tokenize_images(IMAGES)
    assert seen.pop("dtype") == torch.float32
    assert seen == {"path": small_checkpoint, "cache_dir": "somewhere", "token": "secret", "revision": "v1"}
    assert len(processor.visual_tokenizer.calls) == 2
    assert "secret" not in processor.to_json_string()


def test_pickle_and_deepcopy(tokenizing, small_checkpoint):
    options = {"text": "<image><image><image>", "visual_mode": "discrete", "return_tensors": "pt"}
    for processor in (tokenizing, ImageTextProcessor.from_pretrained(small_checkpoint)):
        before = pickle.loads(pickle.dumps(processor))
        expected = processor(IMAGES, **options)["input_ids"]
        clone, unpickled = copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))
        assert copy.copy(processor).visual_tokenizer is processor.visual_tokenizer
        for other in (before, clone, unpickled):
            assert other.tokenizer is not processor.tokenizer
            assert torch.equal(other(IMAGES, **options)["input_ids"], expected)


def test_saving_does_not_copy_the_weights(tokenizing, tmp_path, monkeypatch):
    def no_copy(self, memo):
        raise AssertionError("the visual tokenizer was copied")

    monkeypatch.setattr(FakeVisualTokenizer, "__deepcopy__", no_copy, raising=False)
    tokenizing.save_pretrained(tmp_path)
    assert "ImageTextProcessor" in repr(tokenizing)
    assert tokenizing.visual_tokenizer is not None


def test_decode_passes_through(processor):
    ids = [START, V + 2, END, *processor.tokenizer.encode("a cat"), 2]
    assert processor.decode(ids, skip_special_tokens=True) == "a cat"
    assert processor.batch_decode([ids], skip_special_tokens=True) == ["a cat"]
    assert processor.post_process_image_text_to_text([ids]) == ["a cat"]


def test_needs_its_own_tokenizer(processor):
    with pytest.raises(TypeError, match="LavitTokenizer"):
        ImageTextProcessor(processor.image_processor, None)


def test_encoder_runs_once_for_all_discrete_images(small_checkpoint):
    visual_tokenizer = LavitVisualTokenizer.from_pretrained(small_checkpoint).eval()
    processor = AutoProcessor.from_pretrained(small_checkpoint, visual_tokenizer=visual_tokenizer)
    batches = []
    visual_tokenizer.vision_model.register_forward_hook(
        lambda module, args, kwargs, output: batches.append(
            (kwargs.get("pixel_values", args[0] if args else None)).shape[0]
        ),
        with_kwargs=True,
    )
    modes = [["discrete"], ["continuous", "discrete"]]
    inputs = processor(IMAGES, ["<image>", "<image><image>"], visual_mode=modes, padding=True, return_tensors="pt")
    assert batches == [2]
    assert not inputs["pixel_values"].requires_grad
    assert (inputs["input_ids"] == IMAGE).sum() == N


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("a chat", "A chat is a list of messages, got 'a chat'"),
        (None, "A chat is a list of messages, got None"),
        ([], "The chat is empty"),
        ([[]], "The chat is empty"),
        (["a"], "Message 0 of the chat must have a role and a content, got 'a'"),
        ([{"content": "a"}], "must have a role"),
        ([{"role": "user"}], "the content must be a text or a list of parts, got None"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], "Message 1 .* got 5"),
        ([{"role": "user", "content": [{"text": "a"}]}], "every part must have a type"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part of type 'text' must have a text"),
    ],
)
def test_chats_of_other_forms_are_refused(processor, chat, message):
    for options in ({}, {"tokenize": True, "return_dict": True}):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat, **options)


def test_every_character_of_a_chat_stays_what_it_is():
    from lavit_hf.processing.chat_messages import hide_brackets, show_brackets

    first, text = "\U000f0000", "<image> \U000f0000"
    hidden, (chat,) = hide_brackets([{"role": "user", "content": text, "<key>": "<"}], beside={"x": "\U000f0001"})
    assert hidden not in (first, "\U000f0001") and "<" not in str(chat)
    assert show_brackets(chat[0]["content"], hidden) == text
    everything = "".join(map(chr, (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))))
    with pytest.raises(ValueError, match="every private-use character"):
        hide_brackets([{"role": "user", "content": everything}])


# Its files, beside those of a model


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint to write into."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def without_processor_config(folder):
    """As older versions of transformers save processors."""
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config["image_processor"]))
    (folder / "processor_config.json").unlink()


def test_patches_come_from_the_model_where_no_file_of_the_processor_tells(folder):
    without_processor_config(folder)
    assert ImageTextProcessor.from_pretrained(folder).image_seq_length == 16
    assert AutoProcessor.from_pretrained(folder).image_seq_length == 16
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"how many patches an image has: processor_config\.json is missing"):
        ImageTextProcessor.from_pretrained(folder)


def test_a_missing_file_is_named(folder):
    (folder / "processor_config.json").unlink()
    with pytest.raises(OSError, match=r"has no processor_config\.json"):
        ImageTextProcessor.from_pretrained(folder)


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": ', b"5"])
def test_broken_files_are_named(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(OSError, match=file):
        ImageTextProcessor.from_pretrained(folder)


def test_a_template_that_is_no_text(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xba\xff")
    with pytest.raises(OSError, match=r"chat_template\.jinja is not readable"):
        ImageTextProcessor.from_pretrained(folder)


def test_placeholders_are_those_of_the_model(folder):
    """Else images would be read as text, and text as images."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 5}))
    with pytest.raises(ValueError, match=r"tokenizer\.json does not fit .*image_token_id is 0 .* 5"):
        ImageTextProcessor.from_pretrained(folder)


def test_processor_and_model_have_to_fit(folder):
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**config, "image_seq_length": 256}))
    with pytest.raises(ValueError, match=r"processor_config\.json does not fit .*image_seq_length is 256 .* 16"):
        ImageTextProcessor.from_pretrained(folder)


def test_images_have_the_size_that_the_model_takes(folder):
    """Else a wrong size takes all of the memory there is before the model can refuse its pictures."""
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["size"] = {"height": 10**6, "width": 56}
    (folder / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"processor_config\.json does not fit .*size is \(1000000, 56\) .* \(56, 56\)"
    ):
        ImageTextProcessor.from_pretrained(folder)


def test_a_tokenizer_alone_names_files_too(folder):
    for file, content in (("tokenizer.json", b"\xff"), ("chat_template.jinja", b"\xff")):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        with pytest.raises(OSError, match=file.replace(".", r"\.")):
            LavitTokenizer.from_pretrained(folder)
        (folder / file).write_bytes(before)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": "7"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*model_max_length must be a number"):
        LavitTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"has no tokenizer\.json: save the tokenizer there, too"):
        LavitTokenizer.from_pretrained(folder)


def test_added_tokens_need_rows(folder):
    """Else an id of the tokenizer has no embedding, or is that of something else."""
    model, processor = (
        LavitForConditionalGeneration.from_pretrained(folder),
        ImageTextProcessor.from_pretrained(folder),
    )
    processor.tokenizer.add_tokens(["<point>"])
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'<point>' has the id 366, but the model 366 rows.*resize_token_embeddings"):
        ImageTextProcessor.from_pretrained(folder)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(folder)
    assert ImageTextProcessor.from_pretrained(folder).tokenizer("<point>")["input_ids"] == [366]
