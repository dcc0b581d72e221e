"""Pipelines that `optimize` has prepared: they draw the same, and say what they can no longer do."""

import sys

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch._dynamo.utils import counters

from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline
from tiny_pixel_decoders import build_pipeline

CODES = [[3, 14, 15], [9]]
EAGER = {"backend": "eager"}


@pytest.fixture
def pipeline():
    torch._dynamo.reset()
    counters.clear()
    return build_pipeline(highres=True)


def draw(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline(CODES, num_inference_steps=2, generator=generator, output_type="np", **options).images


@pytest.mark.parametrize(
    "options",
    [
        {"compile": "blocks", "fullgraph": True, **EAGER},
        {"compile": "whole", **EAGER},
        {"compile": None, "fuse_projections": True, "batch_size": 2},
    ],
)
def test_pictures_are_the_same(pipeline, options):
    expected = draw(pipeline)
    assert pipeline.optimize(height=16, width=16, **options) is pipeline
    compiled = counters["stats"]["unique_graphs"]
    assert bool(compiled) == (options["compile"] is not None)
    np.testing.assert_allclose(draw(pipeline), expected, atol=1e-4)
    weight = pipeline.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_blocks_share_what_is_compiled(pipeline):
    pipeline.optimize(**EAGER)
    blocks = [module for module in pipeline.unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert len(blocks) > 1 and counters["stats"]["unique_graphs"] < len(blocks)


def test_nothing_is_drawn_without_a_warm_up(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline), "__call__", lambda *args, **kwargs: pytest.fail("drawn"))
    pipeline.optimize(warm_up=False, **EAGER)


def test_the_warm_up_shows_what_it_is_and_leaves_random_state_and_bar(pipeline, capsys):
    pipeline._progress_bar_config = {}
    state = torch.get_rng_state()
    pipeline.optimize(compile=None)
    assert "Warming up" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), state) and pipeline._progress_bar_config == {}
    pipeline.set_progress_bar_config(disable=True)
    pipeline.optimize(compile=None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "everything"}, "must be one of blocks, whole"),
        ({"compile": None, "backend": "eager"}, "backend: options of torch.compile"),
        ({"quantization": "int3"}, "must be one of fp8, int8"),
        ({"quantization": "int8"}, "pip install torchao"),
        ({"height": 13}, "multiple of"),
    ],
)
def test_bad_options(pipeline, options, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    with pytest.raises((ValueError, ImportError), match=message):
        pipeline.optimize(**options)


def test_tiles_only_where_memory_is_short(pipeline, monkeypatch):
    pipeline.optimize(compile=None)
    assert not pipeline.vae.use_slicing and not pipeline.vae.use_tiling
    decode = pipeline.vae.decode

    def short(needs_tiling):
        def decode_in_little_memory(*args, **kwargs):
            if not (pipeline.vae.use_tiling if needs_tiling else pipeline.vae.use_slicing):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return decode(*args, **kwargs)

        return decode_in_little_memory

    monkeypatch.setattr(pipeline.vae, "decode", short(needs_tiling=False))
    pipeline.optimize(compile=None)
    assert pipeline.vae.use_slicing and not pipeline.vae.use_tiling
    monkeypatch.setattr(pipeline.vae, "decode", short(needs_tiling=True))
    pipeline.optimize(compile=None)
    assert pipeline.vae.use_tiling
    pipeline.disable_vae_tiling()
    monkeypatch.setattr(type(pipeline), "enable_vae_tiling", lambda self: None)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.optimize(compile=None)


def test_fused_projections_can_be_taken_back(pipeline, tmp_path):
    pipeline.unfuse_projections()  # of nothing
    names, expected = set(pipeline.unet.state_dict()), draw(pipeline)
    pipeline.optimize(compile=None, fuse_projections=True, warm_up=False)
    assert any(isinstance(module, Attention) and module.fused_projections for module in pipeline.unet.modules())
    for attempt in (lambda: pipeline.save_pretrained(tmp_path / "saved"), lambda: pipeline.load_lora_weights({})):
        with pytest.raises(ValueError, match="call unfuse_projections"):
            attempt()
    assert not (tmp_path / "saved").exists()
    pipeline.unfuse_projections()
    assert set(pipeline.unet.state_dict()) == names
    np.testing.assert_allclose(draw(pipeline), expected, atol=1e-4)


def test_a_compiled_pipeline_is_saved_moved_and_adapted(pipeline, tmp_path):
    peft = pytest.importorskip("peft")
    expected = draw(pipeline)
    pipeline.optimize(warm_up=False, **EAGER)
    draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    saved = LavitPixelDecoderPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(saved), expected, atol=1e-4)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    for one in (pipeline, saved):
        torch.manual_seed(0)
        one.unet.add_adapter(config)
    adapted = draw(saved)
    assert np.abs(adapted - expected).max() > 1e-3
    np.testing.assert_allclose(draw(pipeline), adapted, atol=1e-4)
    for options in ({"fuse_projections": True}, {"quantization": "int8"}):
        with pytest.raises(ValueError, match="would leave out its LoRA"):
            pipeline.optimize(**options)
    pipeline.to(torch.bfloat16)
    assert np.isfinite(draw(pipeline)).all()


def test_text_to_image(checkpoint):
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    lengths = []
    generate = pipeline.model.generate
    pipeline.model.generate = lambda **kwargs: lengths.append(kwargs) or generate(**kwargs)
    assert pipeline.optimize(batch_size=2, compile=None) is pipeline
    hook.remove()
    assert rows == [4, 4]  # two pictures with guidance, two steps
    assert len(lengths) == 1 and lengths[0]["max_new_tokens"] == pipeline.default_lengths[1]


def test_int8(pipeline, tmp_path):
    pytest.importorskip("torchao")
    pipeline.unet = type(pipeline.unet)(**{**pipeline.unet.config, "block_out_channels": [16, 32]}).eval()
    expected = draw(pipeline)
    pipeline.optimize(compile=None, quantization="int8")
    quantized = [name for name, value in pipeline.unet.named_parameters() if type(value.data) is not torch.Tensor]
    assert quantized and all("transformer_blocks" in name for name in quantized)
    difference = np.abs(draw(pipeline) - expected)
    assert 0 < difference.mean() < 0.05
    for attempt in (lambda: pipeline.save_pretrained(tmp_path / "saved"), lambda: pipeline.load_lora_weights({})):
        with pytest.raises(ValueError, match="load the pipeline again"):
            attempt()
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="quantized already"):
        pipeline.optimize(compile=None, quantization="int8")


def test_fp8_needs_a_gpu_that_has_it(pipeline):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="compute capability 8.9"):
        pipeline.optimize(quantization="fp8")
