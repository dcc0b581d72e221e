"""LoRA of the U-Net, tiles and slices of the VAE, in both pipelines."""

import numpy as np
import pytest
import torch

from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline

peft = pytest.importorskip("peft")


@pytest.fixture
def lora(checkpoint, tmp_path):
    """A directory with LoRA weights, as diffusers' training scripts write them."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    unet = LavitPixelDecoderPipeline.from_pretrained(checkpoint).unet
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    LavitPixelDecoderPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=weights)
    return tmp_path / "lora"


@pytest.mark.parametrize("kind", [LavitPixelDecoderPipeline, LavitTextToImagePipeline])
def test_lora(kind, checkpoint, lora, images):
    pipeline = kind.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "np"}

    def draw():
        generator = torch.Generator().manual_seed(0)
        if kind is LavitPixelDecoderPipeline:
            return pipeline([[3, 14, 15]], generator=generator, **options).images
        return pipeline.reconstruct(images[0], generator=generator, **options).images

    before = draw()
    pipeline.load_lora_weights(lora, adapter_name="style")
    assert pipeline.get_active_adapters() == ["style"] and pipeline.get_list_adapters() == {"unet": ["style"]}
    adapted = draw()
    assert np.abs(adapted - before).max() > 1e-3
    pipeline.fuse_lora()
    np.testing.assert_allclose(draw(), adapted, atol=1e-4)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(draw(), before, atol=1e-4)
    with pytest.raises(ValueError, match="no LoRA weights of a U-Net"):
        pipeline.load_lora_weights({"text_encoder.lora.up.weight": torch.zeros(1)})


def test_tiles_and_slices(checkpoint):
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint)
    pipeline.enable_vae_tiling()
    pipeline.enable_vae_slicing()
    assert pipeline.pixel_decoder.vae.use_tiling and pipeline.vae.use_slicing
    pipeline.disable_vae_tiling()
    pipeline.disable_vae_slicing()
    assert not pipeline.vae.use_tiling and not pipeline.vae.use_slicing
