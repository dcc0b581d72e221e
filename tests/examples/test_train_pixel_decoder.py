"""The example of stage 3: from scratch, and with codes computed on the way."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from lavit_hf import LavitImageProcessorPil
from lavit_hf.pipelines import LavitPixelDecoderPipeline
from tiny_models import build_visual_tokenizer
from tiny_pixel_decoders import EPSILON, build_token_decoder, build_vae, pictures, share_codes, unet_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_pixel_decoder").main


@pytest.fixture
def options(tmp_path) -> dict[str, str]:
    """Everything from scratch, and a folder of pictures."""
    parts = {"token_decoder": build_token_decoder(cross_attention_dims=[9]), "vae": build_vae()}
    parts["visual_tokenizer"] = build_visual_tokenizer()
    share_codes(parts["token_decoder"], parts["visual_tokenizer"])
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    LavitImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "visual_tokenizer")
    for name, values in (("unet_config", unet_config()), ("scheduler_config", EPSILON)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    for split in ("train", "validation"):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        for index, picture in enumerate(pictures(4, size=(20, 18))):
            picture.save(tmp_path / "pictures" / split / f"{index}.png")
    return {
        **{name: str(tmp_path / name) for name in parts},
        "unet_config": str(tmp_path / "unet_config.json"),
        "scheduler_config": str(tmp_path / "scheduler_config.json"),
        "dataset": str(tmp_path / "pictures"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": "1",
        "per_device_train_batch_size": "4",
        "use_cpu": "True",
    }


def arguments(options: dict[str, str]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def test_a_folder_of_pictures_and_a_new_decoder(main, options, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main(arguments(options | {"validation_split": "validation", "validation_inference_steps": "1"}))
    pipeline = LavitPixelDecoderPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert list(pipeline.token_decoder.config.cross_attention_dims) == [12]
    assert (tmp_path / "out" / "validation" / "step-0000001.png").is_file()


def test_a_pixel_decoder_goes_on_with_other_codes(main, options, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    first = main(arguments(options)).pipeline
    decoder, tokenizer = build_token_decoder(cross_attention_dims=[9]), build_visual_tokenizer(seed=7)
    share_codes(decoder, tokenizer)
    decoder.save_pretrained(tmp_path / "other_decoder")
    tokenizer.save_pretrained(tmp_path / "visual_tokenizer")
    later = {name: value for name, value in options.items() if name not in ("vae", "unet_config", "scheduler_config")}
    later |= {"pixel_decoder": str(tmp_path / "out"), "token_decoder": str(tmp_path / "other_decoder")}
    second = main(arguments(later | {"output_dir": str(tmp_path / "second"), "learning_rate": "1e-12"})).pipeline
    assert torch.equal(second.token_decoder.codebook.weight, decoder.codebook.weight)
    projections = [one.token_decoder.condition_projections[0].weight for one in (first, second)]
    torch.testing.assert_close(*projections)


@pytest.mark.parametrize("change", [{"pixel_decoder": "somewhere"}, {"vae": ""}])
def test_what_to_train_has_to_be_clear(main, options, change):
    with pytest.raises(
        SystemExit, match="Give either --pixel_decoder .*, or --token_decoder, --vae and --unet_config"
    ):
        main(arguments({name: value for name, value in (options | change).items() if value}))


def test_options_of_the_other_way_are_refused(main, options):
    """Regression: they were ignored."""
    with pytest.raises(SystemExit, match="--decoder says which one of --pixel_decoder"):
        main(arguments(options | {"decoder": "lowres"}))
    scratch = ("token_decoder", "vae", "unet_config")
    trained = {name: value for name, value in options.items() if name not in scratch}
    with pytest.raises(SystemExit, match="--scheduler_config is for a pixel decoder from scratch"):
        main(arguments(trained | {"pixel_decoder": "somewhere"}))
