"""Tests the method's own claims on a world: variants that each lack one part of it, all trained for the same time.

    python examples/worlds/ablate.py --world emoji-small --output_dir out/ablation

Around the encoder and the selector of a checkpoint it trains new visual tokenizers (which patches are kept, and how
many? are tokens quantized?), and on these small language models that write captions (from features or from codes?).
The checkpoint itself then reads and rebuilds pictures from patches of its own choice and from as many that chance
chose, and draws with several scales of guidance. `--output_dir` gets `ablation.json` and `ablation.md`; what is
finished there is not done again. `--only` makes some of the tables.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from ablation.captions import measure_captions, train_captioner
from ablation.drawings import measure_drawings, measure_patches, usual_budget
from ablation.results import CAPTIONS, GUIDANCE, PATCHES, TABLES, TOKENIZERS, Results
from ablation.selection import ALL, DYNAMIC, LEARNED, RANDOM, budgets_of
from ablation.tokenizers import build_tokenizer, measure_tokenizer, train_tokenizer

from lavit_hf import LavitImageProcessorPil, LavitVisualTokenizer, default_checkpoint
from lavit_hf.data.worlds import WORLDS
from lavit_hf.training import exit_on_write_errors

HERE = Path(__file__).resolve().parent
_LANGUAGE_MODEL = HERE.parent / "lavit_emoji" / "language_model.json"
_SHARES = (0.25, 0.5, 1.0)  # of the number of patches that the checkpoint keeps by its own choice


def main(arguments: list[str] | None = None) -> None:
    """Trains and measures what is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/ablation"), help="where everything goes")
    parser.add_argument("--world", type=WORLDS.get, default="emoji-small", help=f"one of {', '.join(WORLDS)}")
    parser.add_argument("--checkpoint", default=str(default_checkpoint()), help="whose encoder, and what draws")
    parser.add_argument("--language_model_config", type=Path, default=_LANGUAGE_MODEL, help="JSON file of new ones")
    parser.add_argument("--tokenizer_steps", type=int, default=800, help="updates of each tokenizer")
    parser.add_argument("--caption_steps", type=int, default=500, help="updates of each language model")
    parser.add_argument("--num_scenes", type=int, default=1000, help="new scenes to read tokens and captions of")
    parser.add_argument("--num_drawings", type=int, default=200, help="drawings of each kind")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables, by default all")
    args = parser.parse_args(arguments)
    if args.world is None:
        parser.error(f"--world has to be one of {', '.join(WORLDS)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = Results(args.output_dir / "ablation.json")
    compare = {
        TOKENIZERS: compare_tokenizers,
        CAPTIONS: compare_captions,
        PATCHES: compare_patches,
        GUIDANCE: compare_guidance,
    }
    for table in TABLES:
        if table in args.only:
            compare[table](args, results)
    (args.output_dir / "ablation.md").write_text(results.to_markdown(), encoding="utf-8")
    print(results.to_markdown())


def compare_tokenizers(args: argparse.Namespace, results: Results) -> None:
    """Which patches are kept, and how many, and whether tokens are quantized."""
    for selection, is_quantized in ((DYNAMIC, True), (ALL, True), (RANDOM, True), (DYNAMIC, False)):
        name = selection if is_quantized else f"{selection}, not quantized"
        results.add(TOKENIZERS, name, run_tokenizer, args, selection, is_quantized, False)
    for selection in (DYNAMIC, LEARNED, RANDOM):
        results.add(TOKENIZERS, f"{selection}, random budgets", run_tokenizer, args, selection, True, True)


def run_tokenizer(args: argparse.Namespace, selection: str, is_quantized: bool, has_budgets: bool) -> dict[str, Any]:
    """Trains, measures and saves a tokenizer."""
    image_processor = LavitImageProcessorPil.from_pretrained(args.checkpoint)
    trained = LavitVisualTokenizer.from_pretrained(args.checkpoint)
    model = build_tokenizer(trained, selection, is_quantized, has_budgets, args.tokenizer_steps)
    folder = tokenizer_folder(args, selection, has_budgets)
    train_tokenizer(model, args.world, image_processor, args.tokenizer_steps, folder, args.bf16)
    if is_quantized:
        model.visual_tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
    budgets = budgets_of(trained.config.num_patches) if is_quantized and selection != ALL else ()
    return measure_tokenizer(model, args.world, image_processor, args.num_scenes, budgets)


def tokenizer_folder(args: argparse.Namespace, selection: str, has_budgets: bool) -> Path:
    """Where the quantized tokenizer with this selection is."""
    return args.output_dir / "tokenizers" / (selection.replace(" ", "-") + "-budgets" * has_budgets)


def compare_captions(args: argparse.Namespace, results: Results) -> None:
    """Which patches are kept, and how many, and whether a language model reads features or codes."""
    text_model = args.output_dir / "language_model"
    if not text_model.exists():
        words = ["--config", str(args.language_model_config), "--output_dir", str(text_model)]
        words += ["--world", args.world.name]
        subprocess.run([sys.executable, str(HERE / "make_language_model.py"), *words], check=True)
    for selection in (DYNAMIC, ALL, RANDOM):
        for mode in ("continuous", "discrete"):
            results.add(CAPTIONS, f"{selection}, {mode}", run_captions, args, selection, mode, False)
    for selection in (DYNAMIC, RANDOM):
        name = f"{selection}, continuous, random budgets"
        results.add(CAPTIONS, name, run_captions, args, selection, "continuous", True)


def run_captions(args: argparse.Namespace, selection: str, mode: str, has_budgets: bool) -> dict[str, Any]:
    """Trains and measures a language model."""
    folder, text_model = tokenizer_folder(args, selection, has_budgets), args.output_dir / "language_model"
    model, processor = train_captioner(
        args.world,
        str(folder),
        str(text_model),
        selection,
        mode,
        has_budgets,
        args.caption_steps,
        args.output_dir,
        args.bf16,
    )

    def measure(num_image_tokens: int | None) -> dict[str, Any]:
        measured = measure_captions(model, processor, args.world, args.num_scenes, num_image_tokens)
        return {name: share.to_dict() for name, share in measured.items()}

    num_patches = model.config.visual_tokenizer_config.num_patches
    budgets = budgets_of(num_patches) if mode == "continuous" and selection != ALL else ()
    return measure(None) | {"budgets": {str(budget): measure(budget) for budget in budgets}}


def compare_patches(args: argparse.Namespace, results: Results) -> None:
    """Whether the patches that the checkpoint chooses tell more than as many others."""
    usual = usual_budget(args.checkpoint, args.world, args.num_scenes)
    num_scenes, num_drawings = args.num_scenes, args.num_drawings
    for share in _SHARES:
        num_tokens = max(round(share * usual), 1)
        for selection in (DYNAMIC, RANDOM):
            name = f"{num_tokens} ({share:.0%} of the usual), {selection}"
            folder = args.output_dir / "patches" / f"{selection}-{num_tokens}"
            given = args.checkpoint, args.world, selection, num_tokens, num_scenes, num_drawings, folder
            results.add(PATCHES, name, measure_patches, *given)


def compare_guidance(args: argparse.Namespace, results: Results) -> None:
    """How much drawings should follow their prompts."""
    for scale in (1.0, 2.0, 4.0):
        folder = args.output_dir / f"guidance-{scale:g}"
        given = args.checkpoint, args.world, scale, args.num_drawings, folder
        results.add(GUIDANCE, f"{scale:g}", measure_drawings, *given)


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
