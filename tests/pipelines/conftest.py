"""Pixel decoders of the reference checkpoint, and the codes of the recording."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def loaded_decoders(checkpoint) -> dict:
    """Both decoders. Do not change them."""
    from lavit_hf.pipelines import LavitPixelDecoderPipeline

    names = ("highres", "lowres")
    return {name: quiet(LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder=name)) for name in names}


@pytest.fixture
def highres(loaded_decoders):
    return copy.deepcopy(loaded_decoders["highres"])


@pytest.fixture
def lowres(loaded_decoders):
    return copy.deepcopy(loaded_decoders["lowres"])


@pytest.fixture(params=["highres", "lowres"])
def pipeline(request):
    """Either decoder."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def loaded_text_to_image(checkpoint):
    """From prompts to pictures. Do not change it; a shallow copy may get other components."""
    from lavit_hf.pipelines import LavitTextToImagePipeline

    return quiet(LavitTextToImagePipeline.from_pretrained(checkpoint))


@pytest.fixture(scope="session")
def codes(golden) -> list[torch.Tensor]:
    """Codes of three images."""
    return list(golden["dec_codes"].split(golden["dec_counts"].tolist()))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
