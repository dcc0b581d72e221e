"""GGUF files of the exported language model; tests/engines runs llama.cpp on them."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lavit_hf import default_checkpoint
from lavit_hf.hub import PublishError, export_llama
from lavit_hf.hub.llama_gguf import tokenizer_kind, write_gguf

ROOT = Path(__file__).parents[2]


def read_spec(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "worlds")
        yield importlib.import_module("make_language_model")


def test_llama_cpp_knows_the_kinds_of_tokenizers(recipe: ModuleType) -> None:
    assert tokenizer_kind(read_spec(Path(default_checkpoint()))) == "gpt-2"
    assert tokenizer_kind(read_spec(ROOT / "checkpoints" / "lavit-tiny-random")) == "llama"
    backend = recipe.make_tokenizer("scenes", 300).backend_tokenizer
    assert tokenizer_kind(json.loads(backend.to_str())) == "gpt-2"
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    assert tokenizer_kind(json.loads(backend.to_str())) is None


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory):
    """The tiny checkpoint, written in bfloat16 and read by llama.cpp's package."""
    gguf = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf") / "llama"
    export_llama(ROOT / "checkpoints" / "lavit-tiny-random", folder, dtype="bfloat16", gguf=True, progress=False)
    return gguf.GGUFReader(folder / "model.gguf")


def test_values(reader) -> None:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig.from_pretrained(Path(reader.data.filename).parent)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.vocab_size"] == config.vocab_size == 366
    assert fields["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert fields["llama.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"] is False
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and fields["tokenizer.ggml.eos_token_id"] == 2
    # llama.cpp finds control tokens in text: none may spell one of pictures.
    assert {tokens[index] for index, kind in enumerate(types) if kind == 3} == {"</s>"}
    assert "embedding_words" in fields["tokenizer.chat_template"]


def test_scores_rank_as_sentencepiece_does(reader) -> None:
    from sentencepiece import SentencePieceProcessor

    scores = reader.fields["tokenizer.ggml.scores"].contents()
    model = SentencePieceProcessor(model_file=str(Path(reader.data.filename).parent / "tokenizer.model"))
    merged = [i for i in range(model.get_piece_size()) if len(model.id_to_piece(i)) > 1 and not model.is_byte(i)]
    merged = [i for i in merged if not (model.is_control(i) or model.is_unknown(i))]
    assert len(merged) > 3
    ours, theirs = (sorted(merged, key=value, reverse=True) for value in (lambda i: scores[i], model.get_score))
    assert ours == theirs


def test_tensors(reader) -> None:
    import gguf

    llama = LlamaForCausalLM.from_pretrained(Path(reader.data.filename).parent, dtype=torch.float32)
    stored = {one.name: torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)) for one in reader.tensors}
    assert {one.tensor_type.name for one in reader.tensors} == {"BF16", "F32"}
    layer = llama.model.layers[1]
    assert torch.equal(stored["token_embd.weight"], llama.model.embed_tokens.weight)
    assert torch.equal(stored["output.weight"], llama.lm_head.weight)
    assert torch.equal(stored["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight)
    # Halves of a head take turns there.
    size = llama.config.head_dim
    query = layer.self_attn.q_proj.weight[:size]
    assert torch.equal(stored["blk.1.attn_q.weight"][:size:2], query[: size // 2])
    assert torch.equal(stored["blk.1.attn_q.weight"][1:size:2], query[size // 2 :])


def save_llama(folder: Path, recipe: ModuleType, **values) -> Path:
    tokenizer: PreTrainedTokenizerFast = recipe.make_tokenizer("scenes", 300)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), **values)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_slowed_rotations(recipe: ModuleType, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    folder = save_llama(tmp_path / "llama", recipe, rope_parameters=rope)
    write_gguf(folder, tmp_path / "model.gguf", lambda size: None)
    tensors = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    rotations = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(folder)).inv_freq
    plain = 1 / 1e4 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.tensor(tensors["rope_freqs.weight"]), rotations)
    assert tensors["rope_freqs.weight"].max() == 8


def test_refusals(recipe: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
    for name, values, message in (
        ("gelu", {"hidden_act": "gelu"}, "silu.*'gelu'"),
        ("yarn", {"rope_parameters": yarn}, "'yarn'.*convert_hf_to_gguf"),
    ):
        folder = save_llama(tmp_path / name, recipe, **values)
        with pytest.raises(PublishError, match=message):
            write_gguf(folder, tmp_path / f"{name}.gguf", lambda size: None)
    folder = save_llama(tmp_path / "other", recipe)
    spec = read_spec(folder)
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(PublishError, match="GPT-2's kind"):
        write_gguf(folder, tmp_path / "other.gguf", lambda size: None)
    assert not list(tmp_path.glob("*.gguf"))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install 'lavit-hf\\[gguf\\]'"):
        export_llama(ROOT / "checkpoints" / "lavit-tiny-random", tmp_path / "llama", gguf=True, progress=False)
    assert not list(tmp_path.iterdir())
