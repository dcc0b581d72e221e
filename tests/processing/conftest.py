"""A processor for the pictures of the recording; with a visual tokenizer, too."""

import pytest

from lavit_hf import ImageTextProcessor, LavitImageProcessorPil, LavitTokenizer
from processing.recorded import DATA, FakeVisualTokenizer, K, N


@pytest.fixture(scope="module")
def tokenizer() -> LavitTokenizer:
    return LavitTokenizer.from_sentencepiece(DATA / "language_model" / "tokenizer.model", codebook_size=K)


@pytest.fixture
def processor(tokenizer) -> ImageTextProcessor:
    image_processor = LavitImageProcessorPil(size={"height": 56, "width": 56})
    return ImageTextProcessor(image_processor, tokenizer, image_seq_length=N)


@pytest.fixture
def tokenizing(processor) -> ImageTextProcessor:
    processor.visual_tokenizer = FakeVisualTokenizer()
    return processor
