"""The processor: its two forms, its checks, and what saving keeps; chats are in test_chat_messages.py."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Blip2VisionConfig

from lavit_hf import (
    ImageTextProcessor,
    LavitForConditionalGeneration,
    LavitImageProcessorPil,
    LavitTokenizer,
    LavitVisualTokenizer,
    LavitVisualTokenizerConfig,
)
from processing.recorded import END, GOLDEN, IMAGE, IMAGES, META, PATHS, START, FakeVisualTokenizer, K, N, V, image_ids


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
        ({"max_total_image_tokens": 9.0}, "`max_total_image_tokens` must be an integer"),
    ],
)
def test_wrong_budgets(processor, budget, message):
    with pytest.raises(ValueError, match=message):
        processor(images=IMAGES, text=["<image>a<image>", "<image>"], padding=True, **budget)


def test_budgets_of_prompts_without_images(processor):
    plain = processor(text=["a", "b"], padding=True)["input_ids"]
    for budget in ({"num_image_tokens": [[], []]}, {"num_image_tokens": 4}, {"max_total_image_tokens": 4}):
        assert processor(text=["a", "b"], padding=True, **budget)["input_ids"] == plain


@pytest.mark.parametrize(
    "options", [{"num_image_tokens": 4}, {"keep_rate": 0.5}, {"visual_mode": "discrete"}, {"regions": [None]}]
)
def test_what_only_prompts_can_have_is_refused_without_text(processor, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} would be ignored"):
        processor(images=IMAGES[0], **options)


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
@settings(max_examples=100)
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
