"""Pixel decoders of the reference checkpoint, and the codes of the recording."""

import pytest
import torch

pytest.importorskip("diffusers")


@pytest.fixture
def highres(checkpoint):
    from lavit_hf.pipelines import LavitPixelDecoderPipeline

    return quiet(LavitPixelDecoderPipeline.from_pretrained(checkpoint))


@pytest.fixture
def lowres(checkpoint):
    from lavit_hf.pipelines import LavitPixelDecoderPipeline

    return quiet(LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder="lowres"))


@pytest.fixture(params=["highres", "lowres"])
def pipeline(request):
    """Either decoder."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def codes(golden) -> list[torch.Tensor]:
    """Codes of three images."""
    return list(golden["dec_codes"].split(golden["dec_counts"].tolist()))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
