"""From prompts to pictures, and from pictures to pictures, in one call; what a prompt may look like."""

import copy
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub import ModelCard
from PIL import Image
from transformers import GenerationConfig

from lavit_hf import LavitForConditionalGeneration, LavitVisualTokenizer
from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline
from lavit_hf.pipelines.pipeline_lavit_text_to_image import original_pixel_values, split_prompts
from tiny_pixel_decoders import seeded

PROMPTS = ["a red bird", "two dogs on the grass", "cat", ""]
FAST = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def pipeline(loaded_text_to_image):
    """A copy: components may be replaced."""
    return copy.copy(loaded_text_to_image)


def test_one_call_does_what_its_parts_do(pipeline, checkpoint):
    output = pipeline("a red bird", generator=torch.Generator().manual_seed(5), num_inference_steps=3)
    generator = torch.Generator().manual_seed(5)
    inputs = pipeline.processor(text="a red bird", generation_mode="image", return_tensors="pt")
    ids = pipeline.model.generate(
        **inputs,
        generation_mode="image",
        guidance_scale=4.0,
        do_sample=True,
        top_k=50,
        min_new_tokens=1,
        max_new_tokens=16,
        generator=generator,
    )
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    decoder = LavitPixelDecoderPipeline.from_pretrained(checkpoint)
    image = decoder(input_ids=new_ids, num_inference_steps=3, generator=generator).images[0]
    assert isinstance(output.images[0], Image.Image)
    assert image.tobytes() == output.images[0].tobytes()
    assert output.codes[0].tolist() == [id - 302 for id in new_ids[0].tolist() if 302 <= id < 366]
    assert output.nsfw_content_detected is None


def test_greedy_codes_are_the_recorded_ones(pipeline, golden, golden_meta):
    # The original suppresses text only, and drops stray ids afterwards.
    inputs = pipeline.encode_prompt(golden_meta["t2i_prompts"], [[], [], []])
    length = golden["t2i_cfg3_ids"].shape[1]
    options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": length}
    options["suppress_tokens"] = list(range(3, 300))
    codes = pipeline.generate_codes(inputs, guidance_scale=3.0, **options)
    for row, ids in zip(codes, golden["t2i_cfg3_ids"], strict=True):
        assert row.tolist() == [id - 302 for id in ids.tolist() if 302 <= id < 366]


def test_a_batch_is_single_calls(pipeline):
    together = pipeline(PROMPTS, do_sample=False, generator=seeded(0, 1, 2, 3), **FAST)
    for index, prompt in enumerate(PROMPTS):
        alone = pipeline(prompt, do_sample=False, generator=seeded(index), **FAST)
        assert torch.equal(alone.codes[0], together.codes[index])
        np.testing.assert_allclose(alone.images[0], together.images[index], atol=1e-4)


def test_a_list_of_generators_makes_pictures_independent_of_the_batch(pipeline):
    together = pipeline(PROMPTS, generator=seeded(7, 8, 9, 10), num_images_per_prompt=1, **FAST)
    state = torch.get_rng_state()
    alone = pipeline(PROMPTS[1:3], generator=seeded(8, 9), **FAST)
    assert torch.equal(torch.get_rng_state(), state)  # the global state is not touched
    for one, two in zip(alone.codes, together.codes[1:3], strict=True):
        assert torch.equal(one, two)
    np.testing.assert_allclose(alone.images, together.images[1:3], atol=1e-4)


def test_noise_does_not_depend_on_how_long_other_images_are(pipeline):
    """Sampling goes on for the longest image of a batch; the others' generators must not move meanwhile."""
    together = pipeline(PROMPTS, generator=seeded(7, 8, 9, 10), **FAST)
    lengths = [len(codes) for codes in together.codes]
    shortest = lengths.index(min(lengths))
    assert min(lengths) < max(lengths)
    alone = pipeline(PROMPTS[shortest], generator=seeded(7 + shortest), **FAST)
    np.testing.assert_allclose(alone.images[0], together.images[shortest], atol=1e-4)


def test_several_pictures_of_a_prompt(pipeline):
    output = pipeline(PROMPTS[:2], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **FAST)
    assert len(output.images) == len(output.codes) == 4
    second = pipeline(PROMPTS[0], generator=seeded(1), **FAST)
    assert torch.equal(second.codes[0], output.codes[1])


def test_numpy_numbers(pipeline):
    options = {
        "num_images_per_prompt": 2,
        "min_new_tokens": 3,
        "max_new_tokens": 5,
        "num_inference_steps": 2,
        "top_k": 7,
    }
    numbers = {name: np.int64(value) for name, value in options.items()}
    names = {"guidance_scale": 3, "decoder_guidance_scale": 2, "temperature": 0.5}
    scales = [{name: kind(value) for name, value in names.items()} for kind in (float, np.float32)]
    drawn = [
        pipeline("cat", generator=torch.Generator().manual_seed(0), output_type="np", **values, **scale).images
        for values, scale in zip((options, numbers), scales, strict=True)
    ]
    assert len(drawn[0]) == 2 and np.array_equal(*drawn)


def test_pictures_in_prompts(pipeline, images, golden):
    prompt = [images[0], "it is running"]
    inputs = pipeline.encode_prompt(["<image>it is running"], [[images[0]]])
    assert inputs["input_ids"][0, :-1].tolist() == golden["mm_prompt_ids"].tolist()
    batch = pipeline([prompt, "cat", [images[1], images[2]]], do_sample=False, generator=seeded(0, 1, 2), **FAST)
    # Guidance is stronger with pictures, for the whole batch.
    alone = pipeline(prompt, do_sample=False, generator=seeded(0), **FAST)
    assert torch.equal(batch.codes[0], alone.codes[0])
    other = pipeline([images[1], "it is running"], do_sample=False, generator=seeded(0), **FAST)
    assert not torch.equal(other.codes[0], alone.codes[0])
    assert pipeline.processor.visual_tokenizer is None  # the given processor stays as it was


def test_negative_prompts_and_guidance_change_the_codes(pipeline):
    def codes(**options):
        return pipeline("a red bird", do_sample=False, generator=seeded(0), **FAST, **options).codes[0]

    plain, negative, unguided = codes(), codes(negative_prompt="blurry"), codes(guidance_scale=1.0)
    assert not torch.equal(plain, negative)
    assert not torch.equal(plain, unguided)
    # Without guidance there is nothing to lead away from.
    assert torch.equal(codes(guidance_scale=1.0, negative_prompt="blurry"), unguided)


def test_a_checkpoint_says_how_much_guidance_it_needs(pipeline, tmp_path, monkeypatch):
    def codes(**options):
        return pipeline("a red bird", do_sample=False, generator=seeded(0), **FAST, **options).codes[0]

    expected = {scale: codes(guidance_scale=scale) for scale in (1.0, 4.0)}
    assert torch.equal(codes(), expected[4.0])
    GenerationConfig(**pipeline.model.generation_config.to_dict(), drawing_guidance_scale=1.0).save_pretrained(
        tmp_path
    )
    monkeypatch.setattr(pipeline.model, "generation_config", GenerationConfig.from_pretrained(tmp_path))
    assert torch.equal(codes(), expected[1.0])
    assert torch.equal(codes(guidance_scale=4.0), expected[4.0])


def test_reconstruction_is_the_recorded_one(pipeline, golden):
    output = pipeline.reconstruct(
        golden["detok_input"], latents=golden["detok_init_latents"], num_inference_steps=4, output_type="pt"
    )
    torch.testing.assert_close(output.images, golden["detok_image"], atol=1e-3, rtol=0)
    assert [len(codes) for codes in output.codes] == golden["detok_keep_mask"].sum(-1).long().tolist()


def test_a_checkpoint_has_a_guidance_of_its_own_for_pixels(pipeline, original_dir, monkeypatch, tmp_path):
    picture = Image.open(original_dir / "images" / "0.png")
    prompt, weak = "a cat", {"guidance_scale": 2.0}
    drawn = pipeline(prompt, decoder_guidance_scale=2.0, generator=seeded(0), **FAST).images
    rebuilt = pipeline.reconstruct(picture, generator=seeded(0), **weak, **FAST).images
    monkeypatch.setattr(pipeline.token_decoder.config, "default_guidance_scale", 2.0)
    assert np.array_equal(pipeline(prompt, generator=seeded(0), **FAST).images, drawn)
    assert np.array_equal(pipeline.reconstruct(picture, generator=seeded(0), **FAST).images, rebuilt)
    stronger = pipeline.reconstruct(picture, guidance_scale=5.0, generator=seeded(0), **FAST).images
    assert not np.array_equal(stronger, rebuilt)
    pipeline.token_decoder.save_pretrained(tmp_path)
    assert type(pipeline.token_decoder.config).from_pretrained(tmp_path).default_guidance_scale == 2.0


def test_reconstruction_of_files(pipeline, original_dir):
    files = [str(original_dir / "images" / f"{index}.png") for index in range(2)]
    output = pipeline.reconstruct(files, generator=seeded(0, 1), **FAST)
    alone = pipeline.reconstruct(Image.open(files[1]), generator=seeded(1), return_dict=False, **FAST)
    np.testing.assert_allclose(output.images[1], alone[0][0], atol=1e-4)
    assert torch.equal(output.codes[1], alone[1][0])


@pytest.mark.parametrize("statistics", [{"do_normalize": False}, {"image_mean": 0.5, "image_std": 0.25}])
def test_pixels_are_normalized_as_the_image_processor_says(pipeline, original_dir, statistics):
    image_processor = copy.copy(pipeline.processor.image_processor)
    for name, value in statistics.items():
        setattr(image_processor, name, value)
    picture = Image.open(original_dir / "images" / "0.png")
    plain = copy.copy(image_processor)
    plain.do_normalize = False
    pixels, expected = (original_pixel_values(picture, one) for one in (image_processor, plain))
    if image_processor.do_normalize:
        expected = (expected - 0.5) / 0.25
    torch.testing.assert_close(pixels, expected)


def test_reconstruction_with_layers_offloaded(pipeline, original_dir):
    """Regression: pixels were sent to the meta device, where the weights seemed to be."""
    picture = Image.open(original_dir / "images" / "0.png")
    expected = pipeline.reconstruct(picture, generator=seeded(0), **FAST)
    pipeline.model = copy.deepcopy(pipeline.model)
    accelerate.cpu_offload(pipeline.model, torch.device("cpu"), offload_buffers=True)
    assert pipeline.model.visual_tokenizer.device.type == "meta"
    output = pipeline.reconstruct(picture, generator=seeded(0), **FAST)
    np.testing.assert_allclose(output.images, expected.images, atol=1e-4)
    assert torch.equal(output.codes[0], expected.codes[0])


def test_settings_for_texts_are_not_for_drawing(pipeline, monkeypatch):
    """Regression: a checkpoint that writes its captions with beams could not draw."""
    expected = pipeline("a cat", generator=seeded(0), **FAST).codes[0]
    config = copy.deepcopy(pipeline.model.generation_config)
    config.update(num_beams=2, repetition_penalty=1.8, no_repeat_ngram_size=1)
    monkeypatch.setattr(pipeline.model, "generation_config", config)
    assert torch.equal(pipeline("a cat", generator=seeded(0), **FAST).codes[0], expected)


def test_one_bias_in_a_list_is_for_all(pipeline):
    drawn = [
        pipeline(["a cat", "a dog"], image_end_bias=bias, batch_size=size, generator=seeded(0, 1), **FAST).codes
        for bias, size in (([0.5], None), ([0.5], 1), (0.5, None))
    ]
    assert all(torch.equal(one, two) for codes in drawn[1:] for one, two in zip(codes, drawn[0], strict=True))


def test_options_about_images_need_images(pipeline):
    for option in ({"num_image_tokens": 3}, {"regions": [(0, 0, 1, 1)]}, {"region_weight": 2.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` is about images in prompts, and there are none"):
            pipeline("a cat", **option, **FAST)


def test_budgets(pipeline, original_dir):
    """How many codes a picture becomes, where it is redrawn and where it is part of a prompt."""
    picture = Image.open(original_dir / "images" / "0.png")
    output = pipeline.reconstruct([picture, picture], num_image_tokens=[2, 5], generator=seeded(0, 1), **FAST)
    assert [len(codes) for codes in output.codes] == [2, 5]
    texts, images = split_prompts([[picture, "a cat"]], "<image>")
    drawing = pipeline.encode_prompt(texts, images, num_image_tokens=3)["input_ids"]
    codes = drawing - pipeline.model.config.visual_token_offset
    assert int(((codes >= 0) & (codes < 64)).sum()) == 3
    drawn = pipeline([picture, "a cat"], num_image_tokens=3, generator=seeded(0), **FAST)
    others = pipeline([picture, "a cat"], num_image_tokens=9, generator=seeded(0), **FAST)
    assert not np.array_equal(drawn.images, others.images)
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        pipeline.reconstruct(picture, num_image_tokens=17, **FAST)


def test_regions(pipeline, original_dir):
    """With as much weight as it takes, all codes are of patches in the box."""
    picture = Image.open(original_dir / "images" / "0.png")
    box = (picture.width / 2, 0, picture.width, picture.height)
    given = {"regions": [box], "region_weight": 1e9, "num_image_tokens": 8}
    (drawn,) = pipeline.reconstruct(picture, generator=seeded(0), **given, **FAST).codes
    pixel_values = original_pixel_values(picture, pipeline.processor.image_processor)
    mask = (torch.arange(16) % 4 >= 2)[None]
    assert torch.equal(drawn, pipeline.model.visual_tokenizer.encode(pixel_values, keep_mask=mask).codes)
    texts, images = split_prompts([[picture, "a cat"]], "<image>")
    prompts = [pipeline.encode_prompt(texts, images, **one)["input_ids"] for one in (given, {"num_image_tokens": 8})]
    assert prompts[0].shape == prompts[1].shape and not torch.equal(*prompts)
    drawings = [pipeline([picture, "a cat"], generator=seeded(0), **one, **FAST) for one in (given, {})]
    assert not np.array_equal(drawings[0].images, drawings[1].images)


def test_how_long_images_are(pipeline):
    short, long = (
        pipeline(["cat", "dog"], image_end_bias=bias, min_new_tokens=2, generator=seeded(0, 1), **FAST).codes
        for bias in (30.0, [-30.0, 30.0])
    )
    assert [len(codes) for codes in short] == [2, 2]
    assert [len(codes) for codes in long] == [16, 2]


def test_low_resolution(checkpoint):
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint, decoder="lowres")
    pipeline.set_progress_bar_config(disable=True)
    assert not pipeline.pixel_decoder.is_highres
    assert pipeline("cat", generator=seeded(0), **FAST).images.shape == (1, 64, 64, 3)


def test_parts_that_are_loaded_already(checkpoint, model, processor):
    decoder = LavitPixelDecoderPipeline.from_pretrained(checkpoint)
    built = LavitTextToImagePipeline(model, processor, **decoder.components)
    loaded = LavitTextToImagePipeline.from_pretrained(checkpoint, model=model, unet=decoder.unet)
    assert built.model is loaded.model is model
    assert loaded.unet is decoder.unet


def test_schedulers_can_be_swapped(pipeline):
    before = pipeline("cat", generator=seeded(0), **FAST).images
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert isinstance(pipeline.pixel_decoder.scheduler, DPMSolverMultistepScheduler)
    assert not np.allclose(pipeline("cat", generator=seeded(0), **FAST).images, before)


def test_dtype(checkpoint):
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert pipeline.model.dtype == pipeline.unet.dtype == pipeline.token_decoder.dtype == torch.bfloat16
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline("cat", generator=seeded(0), **FAST).images).all()
    assert pipeline.to(torch.float32).model.dtype == torch.float32


def test_save_and_load(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path)
    again = LavitTextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    expected = pipeline("cat", generator=seeded(0), **FAST)
    output = again("cat", generator=seeded(0), **FAST)
    assert torch.equal(output.codes[0], expected.codes[0])
    np.testing.assert_array_equal(output.images, expected.images)
    assert isinstance(LavitForConditionalGeneration.from_pretrained(tmp_path), LavitForConditionalGeneration)


def test_callbacks(pipeline):
    steps = []

    def stop_after_two(decoder, step, timestep, tensors):
        steps.append(step)
        decoder._interrupt = step == 1
        return tensors

    pipeline("cat", num_inference_steps=4, callback_on_step_end=stop_after_two, output_type="latent")
    assert steps == [0, 1]


def test_arguments_are_checked_before_anything_is_written(pipeline, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the language model has been asked")

    monkeypatch.setattr(pipeline.model, "generate", never)
    nan = torch.full((1, 4, 8, 8), torch.nan)
    for options, match in [
        ({"height": 63}, "`height` must be a positive multiple of 8"),
        ({"aspect_ratio": "7:1"}, "aspect_ratio"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"latents": nan}, "must be finite"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "shape"),
        ({"output_type": "jpg"}, "output_type"),
        ({"decoder_guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"max_new_tokens": 17}, "at most 16, the most codes"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "in order"),
        ({"max_new_tokens": 0}, "in order"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"generator": seeded(0, 1)}, "2 generators for 1 images"),
    ]:
        with pytest.raises(ValueError, match=match):
            pipeline("cat", **options)
    with pytest.raises(TypeError, match="negative_prompt"):
        pipeline("cat", negative_prompt=3)
    with pytest.raises(TypeError, match="prompt"):
        pipeline(None)


def test_parts_of_different_checkpoints_are_refused(loaded_text_to_image):
    parts = dict(loaded_text_to_image.components)
    config = copy.deepcopy(parts["token_decoder"].config)
    config.codebook_size = 99
    parts["token_decoder"] = type(parts["token_decoder"])(config)
    with pytest.raises(ValueError, match="64 in the model, 64 in the processor, 99 in the token decoder"):
        LavitTextToImagePipeline(**parts)


def test_missing_pixel_decoder(checkpoint, tmp_path: Path, model, processor):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="pixel decoder"):
        LavitTextToImagePipeline.from_pretrained(tmp_path)


PARTS = ("model", "token_decoder", "unet", "vae")


def dtypes(pipeline) -> list[torch.dtype]:
    return [next(getattr(pipeline, name).parameters()).dtype for name in PARTS]


def test_a_variant_of_all_parts_beside_the_full_precision(pipeline, checkpoint, tmp_path: Path):
    pipeline.save_pretrained(tmp_path)
    full = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    half = LavitTextToImagePipeline.from_pretrained(checkpoint, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert all(path.read_bytes() == content for path, content in full.items())
    for folder, stem in (("", "model"), ("token_decoder", "model"), ("unet", "diffusion_pytorch_model")):
        assert len(list((tmp_path / folder).glob(f"{stem}.fp16-*-of-*.safetensors"))) > 1
    assert dtypes(LavitTextToImagePipeline.from_pretrained(tmp_path)) == [torch.float32] * 4
    for path in full:
        path.unlink()
    options = {"variant": "fp16", "use_safetensors": True, "low_cpu_mem_usage": True}
    loaded = LavitTextToImagePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, **options)
    assert dtypes(loaded) == [torch.float16] * 4
    assert LavitPixelDecoderPipeline.from_pretrained(tmp_path, **options).unet is not None
    assert LavitVisualTokenizer.from_pretrained(tmp_path, device_map="cpu", **options) is not None
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LavitForConditionalGeneration.from_pretrained(tmp_path)


def test_arguments_of_loading_reach_the_language_model(checkpoint, tmp_path: Path):
    chosen = {"model": torch.bfloat16, "vae": torch.float16, "default": torch.float32}
    loaded = LavitTextToImagePipeline.from_pretrained(checkpoint, dtype=chosen)
    assert dtypes(loaded) == [torch.bfloat16, torch.float32, torch.float32, torch.float16]
    assert LavitTextToImagePipeline.from_pretrained(checkpoint, device_map="cpu").hf_device_map == "cpu"
    with pytest.raises(ValueError, match="variant=fp61"):
        LavitTextToImagePipeline.from_pretrained(checkpoint, variant="fp61")


@pytest.mark.parametrize("components", [None, ["model", "unet"]])
def test_one_quantization_for_all_parts_is_refused(checkpoint, components):
    """Regression: it reached the U-Net, and the language model, the largest part, was loaded whole without a word."""
    everything = SimpleNamespace(quant_backend="quanto", quant_mapping=None, components_to_quantize=components)
    with pytest.raises(ValueError, match="needs a quantization of its own"):
        LavitTextToImagePipeline.from_pretrained(checkpoint, quantization_config=everything)


def test_uploading_while_saving(pipeline, tmp_path: Path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "diffusers.pipelines.pipeline_utils.create_repo", lambda name, **kw: SimpleNamespace(repo_id=name)
    )
    monkeypatch.setattr(
        "diffusers.pipelines.pipeline_utils.load_or_create_model_card", lambda *args, **kw: ModelCard("")
    )

    def upload(self, folder, repo_id, **kwargs):
        calls.append((repo_id, {path.name for path in Path(folder).iterdir()}))

    monkeypatch.setattr(LavitPixelDecoderPipeline, "_upload_folder", upload)
    (tmp_path / "pushed").mkdir()
    (tmp_path / "pushed" / "token.txt").write_text("mine")
    pipeline.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="me/lavit")
    ((repository, names),) = calls
    assert repository == "me/lavit" and {"model.safetensors", "model_index.json"} <= names
    assert "token.txt" not in names  # what lay there before is nobody's business
    assert (tmp_path / "pushed" / "model.safetensors").is_file()


PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("prompt", "texts", "counts"),
    [
        ("a cat", ["a cat"], [0]),
        ("", [""], [0]),
        (["a", "b"], ["a", "b"], [0, 0]),
        ([PICTURE, "a"], ["<image>a"], [1]),
        (["in ", PICTURE, " style of ", PICTURE], ["in <image> style of <image>"], [2]),
        (PICTURE, ["<image>"], [1]),
        ([[PICTURE, "a"], "b", ["c"]], ["<image>a", "b", "c"], [1, 0, 0]),
        ([np.zeros((4, 4, 3)), "a"], ["<image>a"], [1]),
    ],
)
def test_prompts(prompt, texts, counts) -> None:
    found, images = split_prompts(prompt, "<image>")
    assert found == texts
    assert [len(one) for one in images] == counts


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        (None, TypeError, "NoneType"),
        (3, TypeError, "int"),
        ([], ValueError, "at least one prompt"),
        ([[]], TypeError, r"`prompt\[0\]` .* an empty list"),
        (["a", 3], TypeError, r"`prompt\[1\]` .* int"),
        ([[PICTURE, None]], TypeError, "NoneType"),
        ([PICTURE, "an <image>"], ValueError, "'<image>', which stands for an image"),
    ],
)
def test_bad_prompts(prompt, error, match) -> None:
    with pytest.raises(error, match=match):
        split_prompts(prompt, "<image>")


def test_release_preprocessing_is_the_recorded_one(processor, golden) -> None:
    pixel_values = original_pixel_values(golden["detok_input"], processor.image_processor)
    torch.testing.assert_close(pixel_values, golden["detok_pixel_values"], atol=1e-5, rtol=0)


def test_release_preprocessing_takes_pictures_of_several_kinds(processor) -> None:
    array = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    expected = original_pixel_values(Image.fromarray(array), processor.image_processor)
    for other in (array, torch.from_numpy(array), (array / 255).astype(np.float32)):
        torch.testing.assert_close(original_pixel_values([other], processor.image_processor), expected)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        original_pixel_values(array.astype(np.float32), processor.image_processor)
