"""llama.cpp reads and draws with the exported language model as `generate` does (`make test-serving`)."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.reference import Reference, count_equal
from lavit_hf import LavitTokenizer

bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings", reason="no wheel of llama.cpp is installed")

TEXTS = (
    "a cat",
    "  two  spaces",
    "Question: what is it? Answer:",
    "tab\t\n\n x",
    "caf\u00e9 \u4f60\u597d \U0001f642 \ufdd1 1,234 I'll we're",
    "<img><visual_3></img><image><unk>",
)


class LlamaCpp:
    """llama.cpp by its own functions: ids or embeddings in, the likeliest of the allowed ids out."""

    def __init__(self, path: Path) -> None:
        self.ffi, self.lib = bindings.get_ffi(), bindings.get_lib()
        self.lib.llama_backend_init()
        options = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), options)
        assert self.model != self.ffi.NULL
        options = self.lib.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = 512, 1, 1
        self.context = self.lib.llama_init_from_model(self.model, options)
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """As the server tokenizes prompts: control tokens are looked for."""
        found = self.ffi.new("llama_token[]", 512)
        raw = text.encode()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), found, 512, True, True)
        return list(found[0:count])

    def write(
        self, prompt: list[int] | torch.Tensor, allowed: list[int], ends: int, length: int, shortest: int = 0
    ) -> list[int]:
        """Goes on after ids, or after embeddings `[tokens, width]`, until the end; without it."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        mask = torch.full((self.lib.llama_vocab_n_tokens(self.vocab),), -torch.inf)
        mask[allowed] = 0
        written: list[int] = []
        seen, past = prompt, 0
        for step in range(length):
            logits = self._decode(seen, past) + mask
            past += len(seen)
            if step < shortest:
                logits[ends] = -torch.inf
            index = int(logits.argmax())
            if index == ends:
                break
            written.append(index)
            seen = [index]
        return written

    def _decode(self, seen: list[int] | torch.Tensor, past: int) -> torch.Tensor:
        is_embedding = isinstance(seen, torch.Tensor)
        batch = self.lib.llama_batch_init(len(seen), seen.shape[1] if is_embedding else 0, 1)
        batch.n_tokens = len(seen)
        if is_embedding:
            values = seen.detach().contiguous().numpy()
            self.ffi.memmove(batch.embd, self.ffi.from_buffer(values), values.nbytes)
        for index in range(len(seen)):
            if not is_embedding:
                batch.token[index] = seen[index]
            batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = past + index, 1, 0
            batch.logits[index] = index == len(seen) - 1
        assert self.lib.llama_decode(self.context, batch) == 0
        logits = self.lib.llama_get_logits_ith(self.context, len(seen) - 1)
        size = 4 * self.lib.llama_vocab_n_tokens(self.vocab)
        found = torch.frombuffer(bytearray(self.ffi.buffer(logits, size)), dtype=torch.float32)
        self.lib.llama_batch_free(batch)
        return found


@pytest.fixture(scope="module")
def engine(llama_dir: Path) -> Iterator[LlamaCpp]:
    engine = LlamaCpp(llama_dir / "model.gguf")
    yield engine
    engine.close()


def test_text_becomes_the_same_ids(engine: LlamaCpp, reference: Reference) -> None:
    tokenizer = LavitTokenizer.from_pretrained(reference.checkpoint)
    for text in TEXTS:
        assert engine.tokenize(text) == tokenizer.encode(text), text


def test_sentencepiece_becomes_the_same_ids(tmp_path: Path) -> None:
    from lavit_hf.hub import export_llama

    tiny = Path(__file__).parents[2] / "checkpoints" / "lavit-tiny-random"
    engine = LlamaCpp(export_llama(tiny, tmp_path / "llama", gguf=True, progress=False) / "model.gguf")
    tokenizer = LavitTokenizer.from_pretrained(tiny)
    for text in TEXTS:
        assert engine.tokenize(text) == tokenizer.encode(text), text
    engine.close()


def test_captions_from_codes(engine: LlamaCpp, reference: Reference) -> None:
    found = [
        engine.write(prompt, reference.text_ids, reference.end_of_text, reference.longest, reference.shortest)
        for prompt in reference.discrete_prompts
    ]
    assert count_equal(found, reference.discrete_captions) == "32/32"


def test_captions_from_features(engine: LlamaCpp, reference: Reference) -> None:
    found = [
        engine.write(one, reference.text_ids, reference.end_of_text, reference.longest, reference.shortest)
        for one in reference.embeddings
    ]
    assert count_equal(found, reference.captions) == "32/32"


def test_drawing(engine: LlamaCpp, reference: Reference) -> None:
    found = [
        engine.write(prompt, reference.picture_ids, reference.end_of_picture, reference.longest_drawing)
        for prompt in reference.drawing_prompts
    ]
    assert count_equal(found, reference.drawn) == "16/16"


def test_completion_endpoint(llama_dir: Path, reference: Reference) -> None:
    """What the README beside the export says of `/completion`."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="no wheel of llama.cpp's server is installed")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(llama_dir / "model.gguf"), 512, 1
    options.cpuparams.n_threads = 1
    server = xllamacpp.Server(options)
    visual = sorted(set(range(reference.vocab_size)) - set(reference.text_ids))
    body = {"temperature": 0, "n_predict": reference.longest, "return_tokens": True}
    found = []
    for prompt in reference.discrete_prompts[:4]:
        banned = [[index, False] for index in visual]
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps({**body, "prompt": prompt, "logit_bias": banned}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.load(answer))
    assert all(reference.end_of_text not in one["tokens"][:-1] for one in found)
    assert [one["tokens"] for one in found if one["tokens"]]
