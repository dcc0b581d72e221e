"""The language model as a plain Llama."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitTokenizer, default_checkpoint
from lavit_hf.conversion.weight_files import ConversionError
from lavit_hf.hub import PublishError, export_llama
from tiny_models import build_model

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "chelsea.jpg"


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "llama"
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "lavit-tiny-random"
    return export_llama(checkpoint, folder, max_shard_size="50KB", progress=False)


@pytest.fixture(scope="module")
def llama(llama_dir: Path):
    model, info = AutoModelForCausalLM.from_pretrained(llama_dir, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@torch.no_grad()
def test_logits_are_equal(llama, tiny_checkpoint: Path) -> None:
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = ImageTextProcessor.from_pretrained(tiny_checkpoint)
    for text in ("<image> It is", "Two: <image> and <image>", "no picture"):
        images = [PICTURE] * text.count("<image>") or None
        inputs = processor(images=images, text=text, visual_mode="discrete", return_tensors="pt")
        assert torch.equal(llama(**inputs).logits, model(**inputs).logits)


def test_generation_is_equal(llama, tiny_checkpoint: Path) -> None:
    """What the documentation says of requests: visual ids are banned from text, and text from images."""
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = ImageTextProcessor.from_pretrained(tiny_checkpoint)
    inputs = processor(text=["a cat", "what is this"], padding=True, return_tensors="pt")
    text = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(llama.generate(**inputs, max_new_tokens=8, suppress_tokens=model.config.visual_token_ids), text)
    inputs = processor(text="a cat", generation_mode="image", return_tensors="pt")
    image = model.generate(**inputs, generation_mode="image", guidance_scale=1.0, max_new_tokens=8)
    end = model.config.eoi_token_id
    options = {"suppress_tokens": list(range(end)), "eos_token_id": end}
    assert torch.equal(llama.generate(**inputs, max_new_tokens=8, **options), image)


def test_tokenizer_is_the_same(llama_dir: Path, llama, tiny_checkpoint: Path) -> None:
    processor = ImageTextProcessor.from_pretrained(tiny_checkpoint)
    own, plain = processor.tokenizer, AutoTokenizer.from_pretrained(llama_dir)
    assert len(plain) == llama.config.vocab_size == len(own)
    assert plain.unk_token_id == own.image_token_id
    assert (plain.bos_token_id, plain.eos_token_id, plain.pad_token_id) == (1, 2, 2)
    for text in ("a cat", "  two  spaces", "</s><s> <unk>", "<img><visual_3></img><image>", "caf\u00e9 \u4f60\n"):
        assert plain(text)["input_ids"] == own(text)["input_ids"], text
    (ids,) = processor.tokenize_images(PICTURE)
    assert plain.decode(ids) == own.decode(ids)
    assert plain.convert_ids_to_tokens(ids.tolist())[1].startswith("<visual_")
    chat = [{"role": "user", "content": "What is it?"}]
    assert (
        plain.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "Question: What is it? Answer:"
    )


def test_words_of_servers(llama_dir: Path, tiny_checkpoint: Path) -> None:
    """vLLM adds a word for embeddings, which text has to become; what spells a token of the model stays text."""
    own, plain = LavitTokenizer.from_pretrained(tiny_checkpoint), AutoTokenizer.from_pretrained(llama_dir)
    typed = "</s><s> <unk> <img><visual_3></img><image>"
    plain.add_special_tokens({"additional_special_tokens": ["<prompt_embeds>"]})
    assert plain.encode("<prompt_embeds>", add_special_tokens=False) == [len(own)]
    assert plain.encode(f"{typed}<prompt_embeds>") == [*own.encode(typed), len(own)]
    assert plain.decode([*own.encode("a cat"), plain.eos_token_id], skip_special_tokens=True) == "a cat"


def test_template_takes_embeddings_for_pictures(llama_dir: Path, tiny_checkpoint: Path) -> None:
    plain = AutoTokenizer.from_pretrained(llama_dir)
    embedding, question = ({"type": "text", "text": text} for text in ("<prompt_embeds>", "What is it?"))

    def render(*parts: dict) -> str:
        messages = [{"role": "user", "content": list(parts)}]
        return plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert render(embedding) == "<prompt_embeds>"
    assert render(embedding, question) == "<prompt_embeds>Question: What is it? Answer:"
    assert render(question, embedding) == "Question: What is it?<prompt_embeds> Answer:"
    # A whole LaVIT knows no such word: it is the user's.
    processor = ImageTextProcessor.from_pretrained(tiny_checkpoint)
    chat = [{"role": "user", "content": [embedding]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == "Question: <prompt_embeds> Answer:"


def test_generation_config_is_kept(tmp_path: Path) -> None:
    checkpoint = Path(default_checkpoint())
    folder = export_llama(checkpoint, tmp_path / "llama", progress=False)
    stored = json.loads((checkpoint / "generation_config.json").read_text())
    kept = json.loads((folder / "generation_config.json").read_text())
    assert stored["min_new_tokens"] == 1
    placeholder = json.loads((checkpoint / "config.json").read_text())["image_token_id"]
    assert kept == {**stored, "suppress_tokens": [placeholder]}
    readme = (folder / "README.md").read_text()
    assert '"min_tokens": 1' in readme and '"max_tokens": 64' in readme  # one code per patch at most


def test_another_variant_beside_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.copyfile(checkpoint / "model.safetensors", checkpoint / "model.fp16.safetensors")
    folder = export_llama(checkpoint, tmp_path / "llama", progress=False)
    assert len(AutoModelForCausalLM.from_pretrained(folder).model.layers) > 0


@torch.no_grad()
def test_dtype(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = export_llama(tiny_checkpoint, tmp_path / "llama", dtype="bfloat16", progress=False)
    llama = AutoModelForCausalLM.from_pretrained(folder)
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert llama.dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 310]])
    assert torch.equal(llama(ids).logits, model(ids).logits)


def test_files(llama_dir: Path, tiny_checkpoint: Path) -> None:
    names = {path.name for path in llama_dir.iterdir()}
    assert not any(name.endswith(".py") for name in names) and "NOTICE" in names
    assert len(list(llama_dir.glob("model-*.safetensors"))) > 1
    config = json.loads((llama_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert (
        json.loads((llama_dir / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    )
    generation = json.loads((llama_dir / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


def test_published_size_has_48386_ids() -> None:
    from lavit_hf import LavitConfig

    assert LavitConfig().text_config.vocab_size == 48386


@torch.no_grad()
def test_tied_embeddings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint, tie_word_embeddings=True)
    model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "tied")
    ImageTextProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "tied")
    llama = AutoModelForCausalLM.from_pretrained(export_llama(tmp_path / "tied", tmp_path / "llama", progress=False))
    ids = torch.tensor([[5, 6, 310]])
    assert llama.lm_head.weight is llama.get_input_embeddings().weight
    assert torch.equal(llama(ids).logits, model(ids).logits)


@torch.no_grad()
def test_tokens_of_users(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = ImageTextProcessor.from_pretrained(tiny_checkpoint)
    own = processor.tokenizer
    own.add_special_tokens({"extra_special_tokens": ["<point>"]})
    own.add_tokens(["<box>"])
    model.resize_token_embeddings(len(own), mean_resizing=False)
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    folder = export_llama(tmp_path / "own", tmp_path / "llama", progress=False)
    llama, plain = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(llama.get_input_embeddings().weight) == len(own)
    for text in ("the <point> is in a <box>", "<box><point>", "<image></s> <visual_3>"):
        ids = own.encode(text)
        assert plain.encode(text) == ids
        assert torch.equal(llama(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def test_refusals(tiny_checkpoint: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    shutil.copytree(tiny_checkpoint, full)
    with pytest.raises(ConversionError, match="not empty"):
        export_llama(tiny_checkpoint, full, progress=False)
    with pytest.raises(PublishError, match="nowhere is not a directory"):
        export_llama(tmp_path / "nowhere", tmp_path / "new", progress=False)
    with pytest.raises(ConversionError, match="dtype must be float32.*int8"):
        export_llama(tiny_checkpoint, tmp_path / "new", dtype="int8", progress=False)
    with pytest.raises(ConversionError, match="much"):
        export_llama(tiny_checkpoint, tmp_path / "new", max_shard_size="much", progress=False)
    build_model(model_type="qwen2").save_pretrained(tmp_path / "qwen")
    with pytest.raises(PublishError, match="'qwen2'"):
        export_llama(tmp_path / "qwen", tmp_path / "new", progress=False)
    config = json.loads((full / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**7
    shutil.copytree(full, tmp_path / "deep")
    (tmp_path / "deep" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match=r"config\.json does not fit the weights.*10000000.* 2 layers"):
        export_llama(tmp_path / "deep", tmp_path / "new", progress=False)
    shutil.rmtree(tmp_path / "deep")
    (full / "tokenizer.json").unlink()
    with pytest.raises((OSError, ValueError)):
        export_llama(full, tmp_path / "new", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "qwen"]


def test_adapters_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(PublishError, match="adapter holds adapters of LoRA, not a whole LaVIT: merge them"):
        export_llama(tmp_path / "adapter", tmp_path / "llama", progress=False)
    assert not (tmp_path / "llama").exists()
