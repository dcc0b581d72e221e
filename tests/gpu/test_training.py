"""One step of every stage in bf16 and in fp16 with a scaler, and gradients that are numbers."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from lavit_hf.training import freeze_for_language_modeling, get_lora_config, upcast_trained_weights
from lavit_hf.training.pixel_decoder.loss import PixelDecoderLoss
from modeling.tiny_pretraining import build_pretraining_model, seeds
from tiny_models import build_model, light_inputs, random_pixels
from tiny_pixel_decoders import build_pipeline
from training.pixel_decoder.test_loss import inputs as diffusion_inputs

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16"])
def dtype(request) -> torch.dtype:
    return request.param


def to_device(values, device: torch.device):
    if isinstance(values, dict):
        return {name: to_device(value, device) for name, value in values.items()}
    return values.to(device) if isinstance(values, torch.Tensor) else values


def step(model: torch.nn.Module, inputs: dict, dtype: torch.dtype, device: torch.device) -> None:
    """A step under autocast, with a scaler in fp16: gradients are numbers, and weights move."""
    trained = [value for value in model.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=dtype == torch.float16)
    with torch.autocast(device.type, dtype):
        output = model(**to_device(inputs, device))
        loss = output if isinstance(output, torch.Tensor) else output["loss"]
    assert loss.isfinite() and loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradients = [value.grad for value in trained if value.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(value, old) for value, old in zip(trained, before, strict=True))


def labelled(model, **options) -> dict:
    """Rows with images and without, in which text is learned."""
    inputs = {**light_inputs(model, random_pixels(3)), "use_cache": False, **options}
    is_unlearned = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(is_unlearned, -100)}


def test_stage_1(device, dtype):
    model = build_pretraining_model().to(device)
    step(model, {"pixel_values": random_pixels(4), "sample_seeds": seeds(4)}, dtype, device)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_2(device, dtype, checkpointing):
    model = build_model()
    inputs = labelled(model)
    model = freeze_for_language_modeling(model).to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    step(model, inputs, dtype, device)


def test_lora_on_a_base_in_half_precision(device, dtype):
    model = build_model()
    inputs = labelled(model)
    adapted = get_peft_model(model.to(device, dtype), get_lora_config(model))
    upcast_trained_weights(adapted)
    step(adapted.train(), inputs, dtype, device)


@pytest.mark.parametrize("highres", [True, False])
def test_stage_3(device, dtype, highres):
    pipeline = build_pipeline(highres).to(device)
    loss = PixelDecoderLoss(pipeline.unet, pipeline.token_decoder, pipeline.scheduler.config)
    inputs = diffusion_inputs(drop=[False, True, False])
    if not highres:
        del inputs["time_ids"]
    step(loss, inputs, dtype, device)


# cuDNN's backward pass gave NaN for lengths of 64 modulo 128 where rows began with positions that see nothing.


@pytest.fixture(scope="module")
def wide():
    """Heads of 64, which every kernel takes."""
    return build_model(hidden_size=128, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [64, 128, 192, 200, 320])
@pytest.mark.parametrize("has_images", [True, False])
def test_gradients_of_padded_rows(wide, device, side, length, has_images):
    """With cuDNN's attention wherever it can be used, on a GPU."""
    model = copy.deepcopy(wide).to(device, torch.bfloat16).train()
    inputs = labelled(model) if has_images else text_rows(model, length)
    inputs = pad(inputs, length, side, model.config.text_config.pad_token_id)
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH] if device.type == "cuda" else [SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True):
        loss = model(**to_device(inputs, device)).loss
        loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    layer = model.model.language_model.layers[0].self_attn.q_proj
    assert layer.weight.grad.any()


def text_rows(model, length: int) -> dict:
    """Rows of text alone, one of them short."""
    ids = torch.randint(3, 80, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : length // 2 + 5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


def pad(inputs: dict, length: int, side: str, padding_id: int) -> dict:
    """Brings rows that are padded on the left to a length, padded on either side."""
    padding = {"input_ids": padding_id, "attention_mask": 0, "labels": -100}
    inputs = dict(inputs)
    mask = inputs["attention_mask"].bool()
    for name, value in padding.items():
        rows = [row[kept] for row, kept in zip(inputs[name], mask, strict=True)]
        gaps = [max(length - len(row), 0) for row in rows]
        widths = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
        padded = [torch.nn.functional.pad(row, width, value=value) for row, width in zip(rows, widths, strict=True)]
        inputs[name] = torch.stack(padded)
    return inputs
