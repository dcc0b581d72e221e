"""Files of a checkpoint are compared with each other before anything is built."""

import json
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from transformers import AutoModelForImageTextToText

from lavit_hf import LavitConfig, LavitForConditionalGeneration, LavitModel, LavitTokenDecoder, LavitVisualTokenizer
from lavit_hf.modeling import checkpoint_files
from lavit_hf.modeling.checkpoint_files import find_file
from lavit_hf.utils.safetensors_files import read_headers


def changed(checkpoint: Path, target: Path, file: str, *path: str, value: object) -> Path:
    """A copy of a checkpoint with another value in a JSON file."""
    shutil.copytree(checkpoint, target)
    content = json.loads((target / file).read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (target / file).write_text(json.dumps(content))
    return target


def test_fewer_layers_on_purpose(checkpoint):
    """Of a configuration that the caller passes, transformers loads what there is."""
    config = LavitConfig.from_pretrained(checkpoint)
    config.text_config.num_hidden_layers -= 1
    model = LavitForConditionalGeneration.from_pretrained(checkpoint, config=config)
    assert len(model.model.language_model.layers) == config.text_config.num_hidden_layers
    config.text_config.num_hidden_layers = 10**7
    with pytest.raises(ValueError, match=r"The given configuration does not fit.*num_hidden_layers is 10000000"):
        LavitForConditionalGeneration.from_pretrained(checkpoint, config=config, ignore_mismatched_sizes=True)


def test_models_of_more_than_their_configuration(checkpoint):
    class Named(LavitForConditionalGeneration):
        def __init__(self, config, name):
            super().__init__(config)
            self.name = name

    assert Named.from_pretrained(checkpoint, name="a").name == "a"


LAYERS = [
    ("text_config", "num_hidden_layers"),
    ("visual_tokenizer_config", "merger_num_layers"),
    ("visual_tokenizer_config", "vision_config", "num_hidden_layers"),
]


@pytest.mark.parametrize("path", LAYERS)
@pytest.mark.parametrize("value", [1, 4, 10**7])
def test_numbers_of_layers_that_the_weights_do_not_have(checkpoint, tmp_path, path, value):
    folder = changed(checkpoint, tmp_path / "changed", "config.json", *path, value=value)
    start = time.process_time()  # seconds of this process, however busy the machine
    for load in (AutoModelForImageTextToText, LavitModel, LavitForConditionalGeneration, LavitVisualTokenizer):
        if load is LavitVisualTokenizer and path[0] == "text_config":
            continue  # reads only its own part
        with pytest.raises(ValueError, match=rf"config\.json does not fit the weights.*{path[-1]}.* {value}\b"):
            load.from_pretrained(folder)
    assert time.process_time() - start < 30  # layers are not built, which would take hours


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_config", "vocab_size"), 400),
        (("text_config", "vocab_size"), 10**9),
        (("text_config", "hidden_size"), 96),
        (("visual_tokenizer_config", "codebook_dim"), 16),
        (("visual_tokenizer_config", "codebook_size"), 32),
        (("visual_tokenizer_config", "merger_intermediate_size"), 10**9),
        (("text_config", "num_attention_heads"), 0),
        (("text_config", "hidden_act"), "no activation"),
        (("text_config",), 5),
        (("visual_token_offset",), 7),
        (("eoi_token_id",), 5),
        (("boi_token_id",), "x"),
    ],
)
def test_values_that_do_not_fit_are_named(checkpoint, tmp_path, path, value):
    folder = changed(checkpoint, tmp_path / "changed", "config.json", *path, value=value)
    with pytest.raises(ValueError, match=r"changed/config\.json"):
        LavitForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(("name", "value"), [("num_layers", 10**7), ("num_queries", 17), ("num_heads", 0)])
def test_token_decoders(checkpoint, tmp_path, name, value):
    folder = changed(checkpoint, tmp_path / "changed", "token_decoder/config.json", name, value=value)
    with pytest.raises(ValueError, match=r"token_decoder/config\.json"):
        LavitTokenDecoder.from_pretrained(folder / "token_decoder")


def test_what_users_do_deliberately_still_works(checkpoint, tmp_path, model):
    folder = changed(checkpoint, tmp_path / "changed", "config.json", "text_config", "num_hidden_layers", value=1)
    loaded = LavitForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert len(loaded.model.language_model.layers) == 1
    model.resize_token_embeddings(380)
    model.save_pretrained(tmp_path / "resized", max_shard_size="100KB", variant="fp16")
    again = LavitForConditionalGeneration.from_pretrained(tmp_path / "resized", variant="fp16")
    assert again.get_input_embeddings().weight.shape[0] == 380
    assert LavitModel.from_pretrained(checkpoint, config=LavitConfig.from_pretrained(checkpoint)).device.type == "cpu"


@pytest.mark.parametrize("shard", ["../model.safetensors", "", 5, None])
def test_an_index_names_only_files_beside_it(checkpoint, tmp_path, model, shard):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = shard
    path.write_text(json.dumps(index))
    for load in (LavitForConditionalGeneration, LavitVisualTokenizer):
        with pytest.raises(OSError, match=r"model\.safetensors\.index\.json is no index"):
            load.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 5}', '{"weight_map": {}}', "{}"])
def test_a_broken_index_is_named(tmp_path, model, content):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(OSError, match=r"model\.safetensors\.index\.json is no index"):
        LavitForConditionalGeneration.from_pretrained(tmp_path)


def test_a_broken_generation_config_is_not_passed_over(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(OSError, match=r"generation_config\.json"):
        LavitForConditionalGeneration.from_pretrained(tmp_path / "copy")


def test_files_that_are_not_there_are_none(checkpoint, tmp_path):
    assert find_file(checkpoint, "config.json", {}) == str(Path(checkpoint) / "config.json")
    assert find_file(checkpoint, "tokenizer.model", {}) is None
    assert find_file(tmp_path, "model.safetensors", {"subfolder": "lowres"}) is None
    commit = tmp_path / "models--me--lavit" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    assert find_file("me/lavit", "config.json", {"cache_dir": str(tmp_path)}) == str(commit / "config.json")
    assert find_file("me/lavit", "model.safetensors", {"cache_dir": str(tmp_path)}) is None  # nobody can say, offline
    assert find_file("me/other", "model.safetensors", {"cache_dir": str(tmp_path)}) is None


def test_files_that_must_not_be_read_are_not_taken_for_missing(monkeypatch):
    with pytest.raises(OSError, match="Repo id must"):
        find_file("me/lavit/more", "config.json", {})
    for error in (GatedRepoError("gated", response=Mock()), HfHubHTTPError("no", response=Mock())):
        monkeypatch.setattr("transformers.utils.hub.hf_hub_download", Mock(side_effect=error))
        with pytest.raises(OSError, match="gated|connection error"):
            find_file("me/lavit", "config.json", {})


def test_headers_are_read_once(checkpoint, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoint_files, "read_headers", lambda path: read.append(path) or read_headers(path))
    LavitVisualTokenizer.from_pretrained(checkpoint)
    LavitForConditionalGeneration.from_pretrained(checkpoint)
    assert len(read) == 2
