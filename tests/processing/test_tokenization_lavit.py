"""The tokenizer: sentencepiece's ids, visual rows, and no way to type a control token."""

import copy
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, TextStreamer

import lavit_hf  # noqa: F401  (registers the Auto classes)
from lavit_hf.processing.tokenization_lavit import LavitTokenizer

MODEL_FILE = Path(__file__).parents[1] / "data" / "tiny-original" / "language_model" / "tokenizer.model"
CONTROL = ["<s>", "</s>", "<unk>", "<img>", "</img>", "<image>", "<visual_0>", "<visual_7>", "<visual_63>", "<0x41>"]
V, K = 300, 64


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(MODEL_FILE))


@pytest.fixture(scope="module")
def built() -> LavitTokenizer:
    return LavitTokenizer.from_sentencepiece(MODEL_FILE, codebook_size=K)


@pytest.fixture(scope="module")
def directory(built, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["built", "loaded", "auto", "copied", "pickled", "saved twice"])
def tokenizer(request, built, directory, tmp_path_factory) -> LavitTokenizer:
    if request.param == "built":
        return built
    if request.param == "loaded":
        return LavitTokenizer.from_pretrained(directory)
    if request.param == "auto":
        return AutoTokenizer.from_pretrained(directory)
    if request.param == "copied":
        return copy.deepcopy(built)
    if request.param == "pickled":
        return pickle.loads(pickle.dumps(built))
    again = tmp_path_factory.mktemp("again")
    LavitTokenizer.from_pretrained(directory).save_pretrained(again)
    assert (again / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert (again / "tokenizer_config.json").read_text() == (directory / "tokenizer_config.json").read_text()
    return LavitTokenizer.from_pretrained(again)


def test_layout(tokenizer):
    assert type(tokenizer) is LavitTokenizer
    assert len(tokenizer) == V + 2 + K + 1
    assert (tokenizer.boi_token_id, tokenizer.eoi_token_id) == (V, V + 1)
    assert (tokenizer.visual_token_offset, tokenizer.codebook_size, tokenizer.image_token_id) == (V + 2, K, V + 2 + K)
    names = [tokenizer.boi_token, tokenizer.eoi_token, *(f"<visual_{c}>" for c in range(K)), tokenizer.image_token]
    ids = list(range(V, V + 2 + K + 1))
    assert tokenizer.convert_tokens_to_ids(names) == ids
    assert tokenizer.convert_ids_to_tokens(ids) == names
    assert tokenizer.decode(ids) == "".join(names)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == tokenizer.eos_token_id == 2


texts = st.one_of(
    st.text(),
    st.text(alphabet=" \n\t\r\0\u2581\u3000ab<>/s"),
    st.lists(st.sampled_from([*CONTROL, " ", "  ", "\n", "the in a", "\u2581", "é", "\U0001f642"])).map("".join),
)


@given(text=texts)
@settings(max_examples=150)
def test_ids_are_sentencepieces(tokenizer, sentencepiece, text):
    expected = sentencepiece.encode(text)
    assert tokenizer.encode(text) == expected
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer([text, "x"])["input_ids"][0] == expected
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == expected
    assert tokenizer.backend_tokenizer.encode(text).ids == expected


@pytest.mark.parametrize("text", CONTROL + [f"x{c}x" for c in CONTROL] + [f" {c} " for c in CONTROL])
def test_control_tokens_cannot_be_typed(tokenizer, text):
    control = {0, 1, 2} | set(range(V, len(tokenizer)))
    for ids in (
        tokenizer.encode(text),
        tokenizer(text, add_special_tokens=True)["input_ids"],
        tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)),
    ):
        assert not control & set(ids)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_nothing_is_added_and_empty_text_is_empty(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer("")["input_ids"] == []
    assert 1 not in tokenizer.encode("a", add_special_tokens=True)
    assert tokenizer.num_special_tokens_to_add() == 0


def test_bos_cannot_be_switched_on(directory):
    tokenizer = LavitTokenizer.from_pretrained(directory, add_bos_token=True, add_eos_token=True)
    assert tokenizer.encode("a") == [259]


def test_skip_special_tokens_hides_visual_ids(tokenizer):
    ids = [1, *tokenizer.encode("a cat"), V, V + 2, V + 1 + K, V + 1, V + 2 + K, *tokenizer.encode("on the"), 2]
    assert tokenizer.decode(ids) == "<s> a cat<img><visual_0><visual_63></img><image> on the</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a cat on the"
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == "a cat on the"
    assert tokenizer.batch_decode([ids, ids], skip_special_tokens=True) == ["a cat on the"] * 2
    assert tokenizer.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["a cat on the"] * 2
    assert tokenizer.decode(V, skip_special_tokens=True) == ""
    tokens = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    assert tokens == [*tokenizer.tokenize("a cat"), *tokenizer.tokenize("on the")]
    for number in (V, np.int64(V), np.int32(V)):
        assert tokenizer.convert_ids_to_tokens(number, skip_special_tokens=True) == "<img>"
        assert tokenizer.decode(number, skip_special_tokens=True) == ""


def test_streamer_hides_visual_ids(tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    for index in [*tokenizer.encode("a cat"), V, V + 2, V + 1, *tokenizer.encode("on the")]:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert capsys.readouterr().out.split() == ["a", "cat", "on", "the"]


def test_codes_to_ids_and_back(tokenizer):
    assert tokenizer.convert_codes_to_ids(5) == V + 7
    assert tokenizer.convert_codes_to_ids([0, 63]) == [V + 2, V + 65]
    assert tokenizer.convert_codes_to_ids((0, 63)) == (V + 2, V + 65)
    assert tokenizer.convert_ids_to_codes(np.array([V + 2, V + 65])).tolist() == [0, 63]
    assert tokenizer.convert_codes_to_ids(np.int64(5)) == V + 7
    codes = torch.tensor([[0, 5], [63, 1]])
    assert torch.equal(tokenizer.convert_ids_to_codes(tokenizer.convert_codes_to_ids(codes)), codes)
    assert tokenizer.convert_ids_to_codes([]) == []
    for bad in (-1, K, [0, K], (K,), np.int64(K), torch.tensor([K])):
        with pytest.raises(ValueError, match="not a code"):
            tokenizer.convert_codes_to_ids(bad)
    for bad in (V + 1, V + 2 + K, 0):
        with pytest.raises(ValueError, match="not a visual token id"):
            tokenizer.convert_ids_to_codes(bad)


def test_left_padding(tokenizer):
    batch = tokenizer(["a", "a cat on the"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == 2 and batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][1].all()


def test_published_size_loads_fast(tmp_path):
    LavitTokenizer.from_sentencepiece(MODEL_FILE, codebook_size=16384, text_vocab_size=32000).save_pretrained(tmp_path)
    start = time.process_time()  # seconds of this process, however busy the machine
    tokenizer = LavitTokenizer.from_pretrained(tmp_path)
    assert time.process_time() - start < 5  # less than a second, unless tokens are added one by one
    assert len(tokenizer) == 48387 and tokenizer.boi_token_id == 32000 and tokenizer.codebook_size == 16384
    assert tokenizer.convert_ids_to_tokens(48385) == "<visual_16383>"


def test_not_a_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        LavitTokenizer.from_sentencepiece(tmp_path / "tokenizer.model", 4)


@pytest.mark.parametrize("options", [{"model_type": "unigram"}, {"remove_extra_whitespaces": True}])
def test_other_sentencepiece_kinds_are_refused(tmp_path, options):
    from sentencepiece import SentencePieceTrainer

    arguments = {"model_type": "bpe", "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran in the rain"] * 5),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**arguments, **options},
    )
    with pytest.raises(ValueError, match="unsupported kind"):
        LavitTokenizer.from_sentencepiece(tmp_path / "m.model", 4)


def test_merges_never_make_control_tokens(tmp_path):
    """A vocabulary in which "<s>" and "<0x41>" could be merged from its own pieces."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["<s <s <s </s </s <0x41 <0x41 <0x41 x>", "<s </s <0x41 >"] * 20),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    tokenizer = LavitTokenizer.from_sentencepiece(tmp_path / "m.model", 4)
    for text in (*CONTROL, "<s><s>", "</s> <0x41>x"):
        assert tokenizer.encode(text) == model.encode(text)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Llama-3 and Qwen style: byte-level BPE, its special tokens above the BPE vocabulary, a BOS added."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|role|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def test_byte_level_text_tokenizer(byte_level, tmp_path):
    V = len(byte_level)
    LavitTokenizer.from_text_tokenizer(byte_level, codebook_size=8).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.boi_token_id == V and len(tokenizer) == V + 11
    for name in ("<|begin|>", "<|end|>", "<|role|>", "<think>"):
        assert tokenizer.convert_tokens_to_ids(name) == byte_level.convert_tokens_to_ids(name)
    for text in (
        "the cat",
        " the",
        "\n\nmat é",
        "<|end|>",
        "the<|role|>",
        "<img>",
        "</img>",
        " <visual_1>",
        "<image>",
    ):
        assert tokenizer.encode(text) == byte_level.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not set(tokenizer.encode(text)) & {*range(V, V + 11), *byte_level.all_special_ids}
    assert tokenizer.pad_token == "<|end|>"
    # a token that was added, but is not special, is vocabulary
    assert tokenizer.encode("<think>") == [tokenizer.convert_tokens_to_ids("<think>")]


def test_larger_embedding_table_than_tokenizer(byte_level):
    V = len(byte_level) + 20
    tokenizer = LavitTokenizer.from_text_tokenizer(byte_level, codebook_size=8, text_vocab_size=V)
    assert tokenizer.boi_token_id == V and len(tokenizer) == V + 11
    assert tokenizer.convert_ids_to_tokens(V - 1) == f"<reserved_{V - 1}>"
    with pytest.raises(ValueError, match="text_vocab_size"):
        LavitTokenizer.from_text_tokenizer(byte_level, codebook_size=8, text_vocab_size=10)


def test_unsupported_text_tokenizers(byte_level, built):
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="BPE"):
        LavitTokenizer.from_text_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), 8)
    with pytest.raises(ValueError, match="names <img>"):
        LavitTokenizer.from_text_tokenizer(built, 8)
    with pytest.raises(ValueError, match="backed by the `tokenizers` library .* got ByT5Tokenizer"):
        LavitTokenizer.from_text_tokenizer(ByT5Tokenizer(), 8)
    with pytest.raises(ValueError, match="codebook_size"):
        LavitTokenizer.from_text_tokenizer(byte_level, 0)
    with pytest.raises(ValueError, match="no visual vocabulary"):
        LavitTokenizer(tokenizer_object=byte_level.backend_tokenizer)


def test_files(directory):
    assert sorted(path.name for path in directory.glob("*.json*")) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LavitTokenizer" and config["split_special_tokens"] is True
    assert "name_or_path" not in config or "/" not in config["name_or_path"]


BOX = ["<point>", "</point>", "<box>"]


@pytest.fixture(scope="module", params=["built", "byte level"])
def extended(request, built, byte_level) -> LavitTokenizer:
    """With tokens of a user: two special ones, and one that is text."""
    tokenizer = copy.deepcopy(built) if request.param == "built" else LavitTokenizer.from_text_tokenizer(byte_level, K)
    size = len(tokenizer)
    assert tokenizer.add_special_tokens({"extra_special_tokens": BOX[:2]}) == 2
    assert tokenizer.add_tokens(BOX[2]) == 1
    assert tokenizer.convert_tokens_to_ids(BOX) == [size, size + 1, size + 2] and len(tokenizer) == size + 3
    return tokenizer


@pytest.mark.parametrize("how", ["as it is", "loaded", "saved twice", "auto", "copied", "pickled"])
def test_added_tokens_may_be_typed(extended, how, tmp_path):
    tokenizer, first = extended, len(extended) - 3
    if how in ("loaded", "saved twice", "auto"):
        tokenizer.save_pretrained(tmp_path / "1")
        tokenizer = (AutoTokenizer if how == "auto" else LavitTokenizer).from_pretrained(tmp_path / "1")
    if how == "saved twice":
        tokenizer.save_pretrained(tmp_path / "2")
        tokenizer = LavitTokenizer.from_pretrained(tmp_path / "2")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    if how == "copied":
        tokenizer = copy.deepcopy(tokenizer)
    if how == "pickled":
        tokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert tokenizer.extra_special_tokens == BOX[:2]
    for text in ("<point>", "a<point>the cat</point>on", "<box><point> <box> the", " the cat <point>", "é</point>\n"):
        ids = tokenizer.encode(text)
        assert [index for index in ids if index >= first] == [
            first + BOX.index(name) for name in text.replace(">", ">\0").replace("<", "\0<").split("\0") if name in BOX
        ]
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == tokenizer([text])["input_ids"][0] == ids
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
        hidden = text.replace("<point>", "").replace("</point>", "")
        assert tokenizer.decode(ids, skip_special_tokens=True) == hidden
    words = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat<box>the cat") == [*words, first + 2, *words]  # as if each stood alone
    # And still none of ours.
    for name in [*CONTROL[:-1], tokenizer.eos_token, tokenizer.pad_token]:
        ids = tokenizer.encode(f"a<point>{name}</point> {name}")
        assert not {tokenizer.convert_tokens_to_ids(name)} & set(ids), name
        assert tokenizer.decode(ids) == f"a<point>{name}</point> {name}"


def test_added_tokens_of_other_forms(built, directory):
    tokenizer = copy.deepcopy(built)
    tokenizer.add_tokens([AddedToken("<a>"), AddedToken("<b>", special=True, lstrip=True)])
    tokenizer.add_tokens(["<c>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<d>"]})
    ids = tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>", "<d>"])
    assert [index for index in tokenizer.encode("x<a>x <b><c>x<d>") if index > V + 2 + K] == ids
    assert tokenizer.pad_token_id not in tokenizer.encode("<pad>") and tokenizer.pad_token_id > V + 2 + K
    loaded = LavitTokenizer.from_pretrained(directory, extra_special_tokens=["<point>"])
    assert loaded.encode("<point>") == [V + 2 + K + 1]
    assert loaded.add_special_tokens({"eos_token": "<end>"}) == 1 and loaded.eos_token_id not in loaded.encode("<end>")


@pytest.mark.parametrize("name", ["<img>", "</img>", "<image>", "<visual_3>", "<visual_999999>", "x<image>"])
def test_tokens_of_images_cannot_be_added(built, name):
    tokenizer = copy.deepcopy(built)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<point>"]})
    before = (len(tokenizer), tokenizer.extra_special_tokens, tokenizer.encode(name))
    with pytest.raises(ValueError, match="names a token of images"):
        tokenizer.add_tokens([name])
    for key in ("extra_special_tokens", "additional_special_tokens"):
        with pytest.raises(ValueError, match="names a token of images"):
            tokenizer.add_special_tokens({key: ["<other>", name]})
    assert (len(tokenizer), tokenizer.extra_special_tokens, tokenizer.encode(name)) == before


@pytest.mark.parametrize("token", ["<\ud800>", {"extra_special_tokens": ["<\ud800>"]}])
def test_half_a_character_is_no_token(built, token):
    tokenizer = copy.deepcopy(built)
    with pytest.raises(ValueError, match="lone surrogate '.ud800' at position 1"):
        tokenizer.add_tokens([token]) if isinstance(token, str) else tokenizer.add_special_tokens(token)


def test_named_tokens_stay_untypable_when_added_again(built):
    tokenizer = copy.deepcopy(built)
    tokenizer.add_tokens(["</s>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<s>", "<unk>"]})
    assert not {0, 1, 2} & set(tokenizer.encode("<s> a</s><unk>"))


def test_an_image_stands_between_its_start_and_end(extended):
    codes = extended.convert_codes_to_ids([3, 1])
    ids = extended.add_image_start_and_end(codes)
    assert ids == [extended.boi_token_id, *codes, extended.eoi_token_id]
    assert [tuple(run) for run in extended.split_images(ids)] == [("image", [3, 1])]


def test_split_images_keeps_added_tokens(extended):
    first = len(extended) - 3
    runs = extended.split_images([extended.visual_token_offset, first, first + 2])
    assert [(run.kind, run.ids) for run in runs] == [("image", [0]), ("text", [first, first + 2])]


@pytest.mark.parametrize("text", ["\ud83d", "a cat \udcff", ["fine", "not \ud800"]])
def test_lone_surrogates_are_named(tokenizer, text):
    with pytest.raises(ValueError, match="lone surrogate '.ud"):
        tokenizer(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer(["a"], text_pair=[text] if isinstance(text, str) else text[1:])
    if isinstance(text, str):
        for function in (tokenizer.encode, tokenizer.tokenize):
            with pytest.raises(ValueError, match="lone surrogate"):
                function(text)


@pytest.mark.parametrize("ids", [-1, np.int64(-1), [1, -100], (5, -1), np.array([-1]), torch.tensor([3, -100])])
def test_negative_ids_are_named(tokenizer, ids):
    for function in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        for skip in (False, True):
            with pytest.raises(ValueError, match="is not a token id"):
                function(ids, skip_special_tokens=skip)
    if not isinstance(ids, (int, np.integer)):
        with pytest.raises(ValueError, match="is not a token id"):
            tokenizer.batch_decode([ids])
        with pytest.raises(ValueError, match="is not a token id"):
            tokenizer.split_images(ids)


@pytest.mark.parametrize("token", ["<image>", "<img>", "</img>", "<visual_0>"])
def test_tokens_of_images_get_no_role_in_text(tokenizer, tmp_path, token):
    """`pad_token_id = 0`, a habit with Llama, is the placeholder of images in converted checkpoints."""
    before = tokenizer.special_tokens_map
    token_id = tokenizer.convert_tokens_to_ids(token)
    for change in (
        lambda: setattr(tokenizer, "pad_token", token),
        lambda: setattr(tokenizer, "pad_token_id", token_id),
        lambda: tokenizer.add_special_tokens({"cls_token": "<cls>", "eos_token": token}),
        lambda: tokenizer.add_special_tokens({"pad_token": AddedToken(token)}),
    ):
        with pytest.raises(ValueError, match=f"_token cannot be '{token}', which is a token of images"):
            change()
    assert tokenizer.special_tokens_map == before
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pad_token cannot be"):
        LavitTokenizer.from_pretrained(tmp_path, pad_token=token)
