"""llama.cpp's server reads and draws with the exported language model as `generate` does (`make test-serving`).

Embeddings cannot be sent to it, so pictures are codes here.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.reference import Reference, count_equal
from lavit_hf import LavitTokenizer
from lavit_hf.hub import export_llama

xllamacpp = pytest.importorskip("xllamacpp", reason="no wheel of llama.cpp's server is installed")

TINY = Path(__file__).parents[2] / "checkpoints" / "lavit-tiny-random"
TEXTS = (
    "a cat",
    "  two  spaces",
    "Question: what is it? Answer:",
    "tab\t\n\n x",
    "caf\u00e9 \u4f60\u597d \U0001f642 \ufdd1 1,234 I'll we're",
    "<img><visual_3></img><image><unk>",
)
Post = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def start() -> Callable[..., Post]:
    """Starts servers in this process, which end with it: in float32, or as llama.cpp is by default."""
    servers = []

    def start(model: Path, in_float32: bool = True) -> Post:
        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel = str(model), 512, 1
        if in_float32:
            options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        servers.append(xllamacpp.Server(options))
        address = servers[-1].listening_address

        def post(path: str, **body: Any) -> dict[str, Any]:
            data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(address + path, data, kind), timeout=600) as answer:
                return json.load(answer)

        return post

    return start


@pytest.fixture(scope="module", params=[True, False], ids=["float32", "default"])
def post(start: Callable[..., Post], llama_dir: Path, request: pytest.FixtureRequest) -> Post:
    return start(llama_dir / "model.gguf", request.param)


def write(post: Post, reference: Reference, prompt: list[int], allowed: list[int], length: int) -> list[int]:
    """The likeliest of the allowed ids, up to the end of the text."""
    banned = [[index, False] for index in sorted(set(range(reference.vocab_size)) - set(allowed))]
    options = {"temperature": 0, "return_tokens": True, "logit_bias": banned}
    tokens = post("/completion", prompt=prompt, n_predict=length, **options)["tokens"]
    return tokens[: tokens.index(reference.end_of_text)] if reference.end_of_text in tokens else tokens


def test_text_becomes_the_same_ids(post: Post, start: Callable[..., Post], reference: Reference, tmp_path) -> None:
    """Byte-level BPE and sentencepiece; control tokens are looked for, as in prompts."""
    sentencepiece = start(export_llama(TINY, tmp_path / "llama", gguf=True, progress=False) / "model.gguf")
    for ask, checkpoint in ((post, reference.checkpoint), (sentencepiece, TINY)):
        tokenizer = LavitTokenizer.from_pretrained(checkpoint)
        for text in TEXTS:
            found = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert found == tokenizer.encode(text), text


def test_captions_from_codes(post: Post, reference: Reference) -> None:
    """It has no shortest length: the first id is asked for by itself, without the end."""
    assert reference.shortest == 1
    some = [index for index in reference.text_ids if index != reference.end_of_text]
    found = []
    for prompt in reference.discrete_prompts:
        first = write(post, reference, prompt, some, 1)
        rest = write(post, reference, [*prompt, *first], reference.text_ids, reference.longest - 1)
        found.append([*first, *rest])
    assert count_equal(found, reference.discrete_captions) == "32/32"


def test_drawing(post: Post, reference: Reference) -> None:
    found = []
    for prompt in reference.drawing_prompts:
        drawn = write(post, reference, prompt, reference.picture_ids, reference.longest_drawing)
        end = reference.end_of_picture
        found.append(drawn[: drawn.index(end)] if end in drawn else drawn)
    assert count_equal(found, reference.drawn) == "16/16"
