"""Loading to a GPU: `device_map`, offloading, quantised weights, and no copy in between."""

import importlib.util
from functools import partial

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from lavit_hf import LavitForConditionalGeneration
from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline
from test_reference import CAPTION, prompts

# The language model, which a 4-bit recipe quantizes; everything visual stays.
VISUAL = ["model.visual_tokenizer", "model.multi_modal_projector", "lm_head"]


@pytest.fixture
def caption(prepare, golden_meta):
    """The ids that a model writes for the recorded pictures."""
    inputs = prepare(prompts(golden_meta, "caption"))

    def caption(model, **options) -> torch.Tensor:
        output = model.generate(**inputs, **CAPTION, num_beams=1, **options)
        return output[:, inputs["input_ids"].shape[1] :].cpu()

    return caption


@pytest.mark.parametrize("device_map", ["whole", "auto", "parts"])
def test_device_maps(checkpoint, caption, golden, device, device_map, tmp_path):
    parts = {"model.visual_tokenizer": "cpu", "model.multi_modal_projector": device, "model.language_model": device}
    maps = {"whole": {"": device}, "auto": "auto", "parts": {**parts, "lm_head": device}}
    model = LavitForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, device_map=maps[device_map], offload_folder=tmp_path
    )
    assert torch.equal(caption(model), golden["caption_greedy_ids"])


def test_layers_in_memory_come_and_go(checkpoint, caption, golden, cuda, tmp_path):
    """Where the GPU has no room for all of it, the rest waits in memory and on the disk."""
    model = LavitForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, device_map="auto", max_memory={0: "200KB", "cpu": "400KB"},
        offload_folder=tmp_path,
    )  # fmt: skip
    assert {"cpu", "disk"} & {str(place) for place in model.hf_device_map.values()}
    assert torch.equal(caption(model), golden["caption_greedy_ids"])


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_pipelines(checkpoint, cuda, kind):
    pictures = []
    for offload in (False, True):
        pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if offload:
            getattr(pipeline, f"enable_{kind}_cpu_offload")(device=cuda)
        else:
            pipeline.to(cuda)
        generator = torch.Generator().manual_seed(0)
        output = pipeline("a cat", num_inference_steps=3, generator=generator, output_type="pt")
        pictures.append(output.images.cpu())
    assert pipeline.model.device.type != "cuda"
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=0)


def test_tiles_and_slices(checkpoint, golden, device):
    pipeline = LavitPixelDecoderPipeline.from_pretrained(checkpoint, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    codes = list(golden["dec_codes"].split(golden["dec_counts"].tolist()))
    options = {"latents": golden["highres_init_latents"].to(device), "num_inference_steps": 4, "guidance_scale": 7.0}
    whole = pipeline(codes, output_type="pt", **options).images
    pipeline.enable_vae_slicing()
    torch.testing.assert_close(pipeline(codes, output_type="pt", **options).images, whole, atol=1e-3, rtol=0)


def test_peak_memory_of_loading(checkpoint, cuda):
    """The GPU never holds the weights twice."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(cuda)
    torch.cuda.reset_peak_memory_stats(cuda)
    model = LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, device_map={"": cuda})
    held = torch.cuda.memory_allocated(cuda) - before
    assert torch.cuda.max_memory_allocated(cuda) - before < 1.25 * held + 2**20
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def bitsandbytes_config(**bits: bool) -> BitsAndBytesConfig:
    in_4_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(**bits, **in_4_bits, llm_int8_skip_modules=VISUAL)


def torchao_config(name: str, **options: int) -> TorchAoConfig:
    import torchao.quantization

    config = getattr(torchao.quantization, name)(**options)
    return TorchAoConfig(config, modules_to_not_convert=VISUAL)


def quantizers() -> list:
    """Ways to make configurations, by library."""
    ways = {
        "bitsandbytes": {
            "8-bit": partial(bitsandbytes_config, load_in_8bit=True),
            "nf4": partial(bitsandbytes_config, load_in_4bit=True),
        },
        "torchao": {
            "int8": partial(torchao_config, "Int8WeightOnlyConfig", version=2),
            "fp8": partial(torchao_config, "Float8WeightOnlyConfig"),
        },
    }
    return [
        pytest.param(
            way,
            id=f"{library}-{name}",
            marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}"),
        )
        for library, of_library in ways.items()
        for name, way in of_library.items()
    ]


@pytest.mark.parametrize("make_config", quantizers())
def test_quantized_weights(checkpoint, exact, caption, golden, device, make_config, request):
    """The language model is quantized, the selectors never: the same patches are kept, and most ids stay."""
    if device.type != "cuda" and "torchao-int8" not in request.node.name:
        pytest.skip(f"needs CUDA, not {device}")
    model = LavitForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=make_config(), device_map={"": device}
    )
    pixels = golden["pixel_values"].to(device)
    masks = [one.visual_tokenizer.embed(pixels.to(one.dtype)).keep_mask for one in (model, exact)]
    assert torch.equal(*masks)
    quantized = {name for name, value in model.named_parameters() if type(value) is not torch.nn.Parameter}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in quantized
    assert not any("visual_tokenizer" in name or "lm_head" in name for name in quantized)
    ids, expected = caption(model), golden["caption_greedy_ids"]
    assert ids.shape[0] == expected.shape[0] and (ids < model.config.boi_token_id).all()
