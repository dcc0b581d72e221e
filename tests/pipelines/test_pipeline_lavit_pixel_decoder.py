"""A pipeline of diffusers: how it behaves, and what it refuses; its numbers are in test_reference_pixels.py."""

import math

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from diffusers.callbacks import SDXLCFGCutoffCallback

from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitPixelDecoderPipelineOutput
from lavit_hf.pipelines.pipeline_lavit_pixel_decoder import ASPECT_RATIOS, codes_of_ids, resolve_size, rows_of_ids
from tiny_pixel_decoders import build_safety_checker

STEPS = {"num_inference_steps": 2}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def count_unet_rows(pipeline, monkeypatch) -> list[int]:
    rows: list[int] = []
    forward = pipeline.unet.forward

    def counted(sample, *args, **options):
        rows.append(len(sample))
        return forward(sample, *args, **options)

    monkeypatch.setattr(pipeline.unet, "forward", counted)
    return rows


def test_output_types(pipeline, codes):
    outputs = {
        kind: pipeline(codes, generator=generators(0, 1, 2), output_type=kind, **STEPS)
        for kind in ("pil", "np", "pt", "latent")
    }
    assert all(isinstance(output, LavitPixelDecoderPipelineOutput) for output in outputs.values())
    assert all(output.nsfw_content_detected is None for output in outputs.values())
    images = {kind: output.images for kind, output in outputs.items()}
    assert all(isinstance(image, PIL.Image.Image) and image.size == (64, 64) for image in images["pil"])
    assert images["np"].shape == (3, 64, 64, 3) and images["pt"].shape == (3, 3, 64, 64)
    assert images["latent"].shape == (3, 4, 8, 8)
    assert images["np"].min() >= 0 and images["np"].max() <= 1
    assert np.array_equal(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
    assert np.array_equal((255 * images["np"]).round().astype(np.uint8), np.stack(images["pil"]))


def test_tuple(pipeline, codes):
    images, flagged = pipeline(codes[:1], return_dict=False, **STEPS)
    assert len(images) == 1 and flagged is None


def test_defaults_are_the_published_ones(highres, lowres, codes, monkeypatch):
    for pipeline, steps, scale in ((highres, 25, 7.0), (lowres, 50, 5.0)):
        rows = count_unet_rows(pipeline, monkeypatch)
        pipeline(codes[:1], output_type="latent")
        assert rows == [2] * steps and pipeline.guidance_scale == scale and pipeline.num_timesteps == steps


def test_codes_and_noise_change_the_image(pipeline, codes):
    first = pipeline(codes[:2], generator=generators(0, 0), output_type="pt", **STEPS).images
    other = pipeline(codes[:1], generator=generators(1), output_type="pt", **STEPS).images
    assert (first[0] - first[1]).abs().max() > 1e-3 and (first[0] - other[0]).abs().max() > 1e-2


def test_a_batch_gives_what_its_images_give_alone(pipeline, codes):
    batch = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    for index, image in enumerate(codes):
        alone = pipeline([image], generator=generators(index), output_type="pt", **STEPS).images
        torch.testing.assert_close(alone[0], batch[index], atol=1e-4, rtol=0)


def test_one_generator_reproduces_and_the_global_one_is_left_alone(pipeline, codes):
    before = torch.get_rng_state()
    first, second = (pipeline(codes, generator=generators(3)[0], output_type="pt", **STEPS).images for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


def test_images_per_prompt(pipeline, codes):
    images = pipeline(
        codes[:2], num_images_per_prompt=2, generator=generators(5, 6, 7, 8), output_type="pt", **STEPS
    ).images
    expected = [(0, 5), (0, 6), (1, 7), (1, 8)]
    for image, (index, seed) in zip(images, expected, strict=True):
        alone = pipeline([codes[index]], generator=generators(seed), output_type="pt", **STEPS).images
        torch.testing.assert_close(alone[0], image, atol=1e-4, rtol=0)


def test_given_latents_are_the_noise(pipeline, codes):
    noise = torch.randn(1, 4, 8, 8, generator=generators(4)[0])
    given = pipeline(codes[:1], latents=noise.clone(), output_type="pt", **STEPS).images
    drawn = pipeline(codes[:1], generator=generators(4), output_type="pt", **STEPS).images
    assert torch.equal(given, drawn)


def test_ids_of_the_language_model(pipeline, codes, model):
    config = model.config
    rows = [
        torch.cat(
            [
                torch.tensor([5, 6, config.boi_token_id]),
                image + config.visual_token_offset,
                torch.tensor([config.eoi_token_id]),
            ]
        )
        for image in codes
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
    from_ids = pipeline(input_ids=ids, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    from_codes = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    assert torch.equal(from_ids, from_codes)


@pytest.mark.parametrize("images", [[[]], [[], []], [[1, 2, 3], []]])
def test_images_without_codes_are_drawn(pipeline, images):
    drawn = pipeline(images, output_type="pt", **STEPS).images
    assert drawn.shape == (len(images), 3, 64, 64) and drawn.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_there_is_no_negative_half(pipeline, codes, monkeypatch, scale):
    rows = count_unet_rows(pipeline, monkeypatch)
    plain = pipeline(codes, guidance_scale=scale, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    assert rows == [3, 3]
    nearly = pipeline(codes, guidance_scale=1 + 1e-6, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    assert rows[2:] == [6, 6]
    torch.testing.assert_close(plain, nearly, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (8, 8), (40, 72), (136, 8)])
def test_sizes(pipeline, codes, height, width):
    seen = []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **options: seen.append(options) or forward(*args, **options)
    (image,) = pipeline(codes[:1], height=height, width=width, **STEPS).images
    assert image.size == (width, height)
    if pipeline.is_highres:
        ids = seen[0]["added_cond_kwargs"]["time_ids"]
        assert ids.tolist() == [[height, width, 0, 0, height, width]] * 2


def test_aspect_ratio(pipeline, codes):
    (image,) = pipeline(codes[:1], aspect_ratio="2:3", **STEPS).images
    assert image.height > image.width


def test_callback_sees_and_replaces_tensors(pipeline, codes):
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append((step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds"]
    latents = pipeline(
        codes[:1],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
        output_type="latent",
        **STEPS,
    ).images
    assert [call[0] for call in calls] == [0, 1] and calls[0][1] > calls[1][1] and calls[0][2] == names
    assert not latents.any()


def test_callback_may_return_nothing_and_interrupt(pipeline, codes, monkeypatch):
    def stop(pipe, *_):
        pipe._interrupt = True

    rows = count_unet_rows(pipeline, monkeypatch)
    pipeline(codes[:1], callback_on_step_end=stop, num_inference_steps=4)
    assert rows == [2]
    pipeline(codes[:1], num_inference_steps=4)
    assert rows == [2] * 5


def test_callbacks_of_diffusers(highres, codes, monkeypatch):
    rows = count_unet_rows(highres, monkeypatch)
    highres(
        codes[:1],
        num_inference_steps=4,
        callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
    )
    assert rows == [2, 2, 1, 1]


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, DDIMScheduler])
def test_schedulers(pipeline, codes, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    first, second = (
        pipeline(codes, generator=generators(0, 1, 2), output_type="pt", num_inference_steps=4).images
        for _ in range(2)
    )
    assert first.isfinite().all() and torch.equal(first, second)
    alone = pipeline(codes[1:2], generator=generators(1), output_type="pt", num_inference_steps=4).images
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=0)


def test_first_order_dpm_solver_is_ddim(pipeline, codes):
    """In theory the two are one method; so a swapped scheduler is driven the right way."""
    config = {**pipeline.scheduler.config, "timestep_spacing": "trailing"}
    options = {"latents": torch.randn(1, 4, 8, 8, generator=generators(0)[0]), "output_type": "latent"}
    pipeline.scheduler = DDIMScheduler.from_config(config)
    ddim = pipeline(codes[:1], num_inference_steps=4, **options).images
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=1, final_sigmas_type="sigma_min"
    )
    dpm = pipeline(codes[:1], num_inference_steps=4, **options).images
    torch.testing.assert_close(dpm, ddim, atol=1e-3, rtol=1e-3)


def test_tiling_and_slicing(pipeline, codes):
    whole = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    pipeline.enable_vae_slicing()
    assert pipeline.vae.use_slicing
    sliced = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=0)
    pipeline.disable_vae_slicing()
    pipeline.enable_vae_tiling()
    (tiled,) = pipeline(codes[:1], height=64, width=192, **STEPS).images
    assert tiled.size == (192, 64) and pipeline.vae.use_tiling
    pipeline.disable_vae_tiling()
    assert not pipeline.vae.use_slicing and not pipeline.vae.use_tiling


def test_model_offload(pipeline, codes):
    expected = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        images = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_offload_layer_by_layer(pipeline, codes):
    """As `enable_sequential_cpu_offload` does, which itself refuses to run without an accelerator."""
    expected = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    for part in (pipeline.token_decoder, pipeline.unet, pipeline.vae):
        accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=True)
    assert pipeline.token_decoder.position_embedding.device.type == "meta"
    images = pipeline(codes, generator=generators(0, 1, 2), output_type="pt", **STEPS).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(checkpoint, codes, dtype):
    for decoder in ("highres", "lowres"):
        options = {"generator": generators(0), "output_type": "pt", "num_inference_steps": 4}
        exact = LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder=decoder)
        half = LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder=decoder, dtype=dtype)
        assert {half.unet.dtype, half.vae.dtype, half.token_decoder.dtype} == {dtype}
        expected = exact(codes[:1], **options).images
        options["generator"] = generators(0)
        images = half(codes[:1], **options).images
        assert images.dtype == torch.float32 and half.vae.dtype == dtype
        assert (images - expected).abs().mean() < 0.02


def test_vae_decodes_in_full_precision_where_it_would_overflow(highres, codes, monkeypatch):
    used = []
    decode = highres.vae.decode
    monkeypatch.setattr(highres.vae, "decode", lambda z, **o: used.append(z.dtype) or decode(z, **o))
    highres.vae.to(torch.float16)
    assert highres.vae.config.force_upcast
    highres(codes[:1], **STEPS)
    assert used == [torch.float32] and highres.vae.dtype == torch.float16


def test_parts_of_different_decoders_do_not_go_together(highres, lowres):
    parts = highres.components
    with pytest.raises(ValueError, match="width 24, but the U-Net takes 64"):
        LavitPixelDecoderPipeline(**{**parts, "token_decoder": lowres.token_decoder})
    lowres.token_decoder.config.cross_attention_dims = [64]
    with pytest.raises(ValueError, match="takes a pooled condition"):
        LavitPixelDecoderPipeline(**{**parts, "token_decoder": lowres.token_decoder})


@pytest.mark.parametrize("threshold", [-2.0, 2.0])
def test_safety_checker(lowres, codes, tmp_path, threshold):
    checked = LavitPixelDecoderPipeline(**{**lowres.components, **build_safety_checker(threshold)})
    checked.save_pretrained(tmp_path)
    for pipeline in (checked, LavitPixelDecoderPipeline.from_pretrained(tmp_path)):
        output = pipeline(codes, generator=generators(0, 1, 2), output_type="np", **STEPS)
        assert output.nsfw_content_detected == [threshold < 0] * 3
        assert output.images.any() == (threshold > 0)
    without = LavitPixelDecoderPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert without(codes[:1], **STEPS).nsfw_content_detected is None


def test_safety_checker_needs_a_feature_extractor(lowres):
    with pytest.raises(ValueError, match="feature extractor"):
        LavitPixelDecoderPipeline(**{**lowres.components, **build_safety_checker(0.0), "feature_extractor": None})


OFFSET, CODES, END = 302, 64, 301


@pytest.fixture
def refuse(pipeline, monkeypatch):
    """Calls either pipeline, expecting an error before the token decoder runs."""
    monkeypatch.setattr(pipeline.token_decoder, "forward", lambda *_: pytest.fail("went on with bad input"))

    def call(error, match, *args, **options):
        with pytest.raises(error, match=match):
            pipeline(*args, **options)

    return call


@pytest.mark.parametrize(
    ("codes", "error", "match"),
    [
        ([torch.tensor([0, 64])], ValueError, "Image 0 has the code 64; codes go from 0 to 63"),
        ([torch.tensor([1]), torch.tensor([-1])], ValueError, "Image 1 has the code -1"),
        ([torch.arange(17)], ValueError, "17 codes; an image has at most 16"),
        ([], ValueError, "empty"),
        (torch.empty(0, 3, dtype=torch.long), ValueError, "empty"),
        ([torch.tensor([1.0])], TypeError, "float32"),
        ([torch.tensor([True])], TypeError, "bool"),
        ([[1.5]], TypeError, "float"),
        ([["one"]], TypeError, "codes\\[0\\].*integers"),
        ("one", TypeError, "list of 1-D"),
        (7, TypeError, "list of 1-D"),
        ([torch.zeros(2, 2, dtype=torch.long)], TypeError, "1-D"),
        ([[1, 2], None], TypeError, "codes\\[1\\]"),
    ],
)
def test_codes(refuse, codes, error, match):
    refuse(error, match, codes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 60}, "`height` must be a positive multiple of 8; got 60"),
        ({"width": 0}, "`width`.*got 0"),
        ({"height": -8}, "`height`.*got -8"),
        ({"height": 64.0}, "`height`.*got 64.0"),
        ({"aspect_ratio": "5:1"}, "one of 1:1, 4:3"),
        ({"aspect_ratio": "1:1", "width": 64}, "not both"),
        ({"num_inference_steps": 0}, "positive integer; got 0"),
        ({"num_inference_steps": -4}, "positive integer; got -4"),
        ({"num_inference_steps": 2.5}, "positive integer; got 2.5"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"num_images_per_prompt": 0}, "positive integer; got 0"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"guidance_scale": "7"}, "finite"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"\[1, 4, 8, 8\]; got \[1, 4, 8, 9\]"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"\[1, 4, 8, 8\]"),
        ({"latents": torch.full((1, 4, 8, 8), math.nan)}, "NaN"),
        ({"latents": torch.full((1, 4, 8, 8), math.inf)}, "infinity"),
        ({"input_ids": [[1]]}, "either `codes` or `input_ids`"),
    ],
)
def test_other_arguments(refuse, options, match):
    refuse(ValueError, match, [[1, 2]], **options)


def test_numpy_numbers(pipeline):
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "num_images_per_prompt": 2, "guidance_scale": 3.0}
    numbers = {name: (np.float32 if name == "guidance_scale" else np.int64)(value) for name, value in options.items()}
    drawn = [
        pipeline([[1, 2]], generator=torch.Generator().manual_seed(0), output_type="pt", **values).images
        for values in (options, numbers)
    ]
    assert len(drawn[0]) == 2 and torch.equal(*drawn)


@pytest.mark.parametrize("options", [{"height": np.int64(60)}, {"num_inference_steps": np.int64(0)}])
def test_wrong_numpy_numbers(refuse, options):
    refuse(ValueError, "positive", [[1, 2]], **options)


@pytest.mark.parametrize("latents", [torch.zeros(1, 4, 8, 8, dtype=torch.long), np.zeros((1, 4, 8, 8))])
def test_latents_that_are_no_floats(refuse, latents):
    refuse(TypeError, "tensor of floats", [[1]], latents=latents)


def test_neither_codes_nor_ids(refuse):
    refuse(ValueError, "either `codes` or `input_ids`")


def test_ids_without_knowing_the_vocabulary(pipeline):
    pipeline.register_to_config(visual_token_offset=None)
    with pytest.raises(ValueError, match="visual_token_offset"):
        pipeline(input_ids=[[302]])


@pytest.mark.parametrize(
    ("ids", "match"), [([367], "367; ids go from 0 to 366"), ([-100], "-100"), ([302, END, 303], "several images")]
)
def test_ids(refuse, ids, match):
    refuse(ValueError, match, input_ids=[[302], ids])


def test_ids_that_are_no_codes_are_dropped():
    rows = [[5, 6, 300, 302, 1, 300, 365, END, 2, 2], [302, 303], [END, 2], [366, 300, 310, END, 1, 0]]
    found = codes_of_ids([torch.tensor(row) for row in rows], OFFSET, CODES, END)
    assert [codes.tolist() for codes in found] == [[0, 63], [0, 1], [], [8]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1, 2], []], [[1, 2], []]),
        ([torch.tensor([1]), np.array([2, 3])], [[1], [2, 3]]),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), [[1, 2], [3, 4]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        ([1, 2], [[1, 2]]),
        ((torch.tensor(1), torch.tensor(2)), [[1, 2]]),
    ],
)
def test_forms_of_codes(values, expected):
    found = rows_of_ids(values, "codes")
    assert [codes.tolist() for codes in found] == expected
    assert all(codes.dtype == torch.long for codes in found)


def test_published_sizes():
    sizes = {name: resolve_size(None, None, name, 1024, 8) for name in ASPECT_RATIOS}
    assert sizes == ASPECT_RATIOS
    assert sizes["16:9"] == (768, 1344) and resolve_size(None, None, None, 1024, 8) == (1024, 1024)


def test_sizes_of_other_decoders_keep_shape_and_area():
    assert resolve_size(None, None, "16:9", 512, 8) == (384, 672)
    assert resolve_size(None, None, "1:1", 512, 8) == (512, 512)
    assert resolve_size(None, 64, None, 512, 8) == (512, 64)
