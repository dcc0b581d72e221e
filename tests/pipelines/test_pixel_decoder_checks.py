"""What files say of a pixel decoder has to fit together; errors name the file."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline


def change(checkpoint, folder, file, **values):
    shutil.copytree(checkpoint, folder)
    content = {**json.loads((folder / file).read_text()), **values}
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value != "nothing"}))
    return folder


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"visual_token_offset": 7}),
        ("model_index.json", {"visual_token_offset": 7, "eoi_token_id": 6}),  # differs from config.json
        ("model_index.json", {"visual_token_offset": "302"}),
        ("model_index.json", {"unet": 5}),
        ("model_index.json", {"unet": "nothing"}),
        ("model_index.json", {"scheduler": ["diffusers", "NoScheduler"]}),
        ("model_index.json", {"unet": ["no_library", "UNet2DConditionModel"]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
        ("unet/config.json", {"layers_per_block": 10**7}),
        ("unet/config.json", {"block_out_channels": "x"}),
        ("vae/config.json", {"latent_channels": 8}),
        ("token_decoder/config.json", {"num_layers": 10**7}),
        ("token_decoder/config.json", {"codebook_size": 32}),
    ],
)
def test_values_that_do_not_fit(checkpoint, tmp_path, file, values):
    folder = change(checkpoint, tmp_path / "changed", file, **values)
    for pipeline in (LavitPixelDecoderPipeline, LavitTextToImagePipeline):
        with pytest.raises(ValueError, match=str(folder / file)):
            pipeline.from_pretrained(folder)


def test_low_resolution_is_compared_with_the_language_model_above_it(checkpoint, tmp_path):
    values = {"visual_token_offset": 7, "eoi_token_id": 6}
    folder = change(checkpoint, tmp_path / "changed", "lowres/model_index.json", **values)
    with pytest.raises(ValueError, match=r"7 in .*lowres/model_index\.json, but 302 in .*config\.json"):
        LavitPixelDecoderPipeline.from_pretrained(folder, decoder="lowres")
    assert LavitPixelDecoderPipeline.from_pretrained(folder).config.visual_token_offset == 302


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "token_decoder/config.json"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b'{"_class_name": ', b"\xff\xfe"])
def test_files_that_are_no_json_objects(checkpoint, tmp_path, file, content):
    shutil.copytree(checkpoint, tmp_path / "broken")
    (tmp_path / "broken" / file).write_bytes(content)
    with pytest.raises(OSError, match=str(tmp_path / "broken" / file)):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "broken")


def test_corrupt_weights(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "broken")
    file = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=str(file)):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_lack_a_tensor(checkpoint, tmp_path, part):
    shutil.copytree(checkpoint, tmp_path / "broken")
    file = tmp_path / "broken" / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    lost = max(weights)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"{file} lacks 1 tensors, the first is {lost}"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "broken")


def test_ids_that_cannot_be(highres):
    with pytest.raises(ValueError, match="ids 300 to 363 .* image end cannot have the id 301"):
        LavitPixelDecoderPipeline(**{**highres.components, "visual_token_offset": 300})


def test_ids_come_along_with_components(highres, codes):
    ids = [code + 302 for code in codes]
    for other in (LavitPixelDecoderPipeline(**highres.components), LavitPixelDecoderPipeline.from_pipe(highres)):
        assert (other.config.visual_token_offset, other.config.eoi_token_id) == (302, 301)
        other.set_progress_bar_config(disable=True)
        other(input_ids=ids, num_inference_steps=1)
    assert highres.to("cpu").device.type == "cpu"  # diffusers finds modules among the components


def test_ids_come_from_the_language_model(checkpoint):
    whole = LavitTextToImagePipeline.from_pretrained(checkpoint)
    decoder = LavitPixelDecoderPipeline.from_pipe(whole)
    assert (decoder.config.visual_token_offset, decoder.config.eoi_token_id) == (302, 301)
    again = LavitTextToImagePipeline.from_pipe(decoder, model=whole.model, processor=whole.processor)
    assert again.model is whole.model and again.unet is whole.unet
    with pytest.raises(ValueError, match="id of code 0 is 302 in the model, 302 in the processor, 7 in the pixel"):
        LavitTextToImagePipeline(**{**whole.components, "visual_token_offset": 7})
