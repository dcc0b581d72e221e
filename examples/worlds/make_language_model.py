"""Makes the language model that becomes a LaVIT: a small Llama with random weights, and its tokenizer.

    python examples/worlds/make_language_model.py --config examples/lavit_scenes/language_model.json \
        --output_dir out/lavit-scenes/language_model

The tokenizer is a byte-level BPE learned from captions, questions and layouts of a world of scenes, so that every word
of theirs becomes one token, while any other text can be written, too. It splits text as GPT-2's does, a kind that
llama.cpp knows: `lavit export-llama --gguf` writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast

from lavit_hf.data.worlds import find_world
from lavit_hf.training import exit_on_write_errors

_NUM_SCENES = 3000
_END = "</s>"


@dataclass
class Arguments:
    """What to make."""

    config: str = field(metadata={"help": "A JSON file with `model_type` and sizes of the language model."})
    output_dir: str = field(metadata={"help": "Where model and tokenizer go."})
    world: str = field(default="scenes", metadata={"help": "What its texts are about: scenes or emoji."})
    vocab_size: int = field(default=512, metadata={"help": "Size of the vocabulary of text, at most."})
    seed: int = field(default=0, metadata={"help": "Of the random weights."})


def make_tokenizer(world: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Learns a tokenizer from captions, questions and answers, worded as the model will see them."""
    backend = Tokenizer(models.BPE())
    # As GPT-2's: with another kind, llama.cpp would read text as other ids (tests/hub/test_llama_gguf.py).
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        find_world(world).make_texts(_NUM_SCENES),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<unk>", _END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=_END, pad_token=_END)


def main(arguments: list[str] | None = None) -> None:
    """Makes model and tokenizer."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    tokenizer = make_tokenizer(args.world, args.vocab_size)
    values = json.loads(Path(args.config).read_text(encoding="utf-8"))
    end = tokenizer.eos_token_id
    config = AutoConfig.for_model(
        **values, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=end
    )
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens of text")


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
