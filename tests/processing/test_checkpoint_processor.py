"""A processor fits the model that it stands beside; errors name the file."""

import json
import shutil

import pytest
from transformers import AutoProcessor

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitTokenizer


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint to write into."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def without_processor_config(folder):
    """As older versions of transformers save processors."""
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config["image_processor"]))
    (folder / "processor_config.json").unlink()


def test_patches_come_from_the_model_where_no_file_of_the_processor_tells(folder):
    without_processor_config(folder)
    assert ImageTextProcessor.from_pretrained(folder).image_seq_length == 16
    assert AutoProcessor.from_pretrained(folder).image_seq_length == 16
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"how many patches an image has: processor_config\.json is missing"):
        ImageTextProcessor.from_pretrained(folder)


def test_a_missing_file_is_named(folder):
    (folder / "processor_config.json").unlink()
    with pytest.raises(OSError, match=r"has no processor_config\.json"):
        ImageTextProcessor.from_pretrained(folder)


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": ', b"5"])
def test_broken_files_are_named(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(OSError, match=file):
        ImageTextProcessor.from_pretrained(folder)


def test_a_template_that_is_no_text(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xba\xff")
    with pytest.raises(OSError, match=r"chat_template\.jinja is not readable"):
        ImageTextProcessor.from_pretrained(folder)


def test_placeholders_are_those_of_the_model(folder):
    """Else images would be read as text, and text as images."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 5}))
    with pytest.raises(ValueError, match=r"tokenizer\.json does not fit .*image_token_id is 0 .* 5"):
        ImageTextProcessor.from_pretrained(folder)


def test_processor_and_model_have_to_fit(folder):
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**config, "image_seq_length": 256}))
    with pytest.raises(ValueError, match=r"processor_config\.json does not fit .*image_seq_length is 256 .* 16"):
        ImageTextProcessor.from_pretrained(folder)


def test_a_tokenizer_alone_names_files_too(folder):
    for file, content in (("tokenizer.json", b"\xff"), ("chat_template.jinja", b"\xff")):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        with pytest.raises(OSError, match=file.replace(".", r"\.")):
            LavitTokenizer.from_pretrained(folder)
        (folder / file).write_bytes(before)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": "7"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*model_max_length must be a number"):
        LavitTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"has no tokenizer\.json: save the tokenizer there, too"):
        LavitTokenizer.from_pretrained(folder)


def test_added_tokens_need_rows(folder):
    """Else an id of the tokenizer has no embedding, or is that of something else."""
    model, processor = (
        LavitForConditionalGeneration.from_pretrained(folder),
        ImageTextProcessor.from_pretrained(folder),
    )
    processor.tokenizer.add_tokens(["<point>"])
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'<point>' has the id 366, but the model 366 rows.*resize_token_embeddings"):
        ImageTextProcessor.from_pretrained(folder)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(folder)
    assert ImageTextProcessor.from_pretrained(folder).tokenizer("<point>")["input_ids"] == [366]
