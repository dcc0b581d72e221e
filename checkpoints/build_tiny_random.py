"""Builds `checkpoints/lavit-tiny-random` from the tests' original-layout checkpoint, without files of code.

python checkpoints/build_tiny_random.py [DESTINATION]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from lavit_hf.conversion import convert

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "data" / "tiny-original"
DESTINATION = ROOT / "checkpoints" / "lavit-tiny-random"
HEADS = {"vision": 4, "merger": 4, "decoder": 4}

_WARNING = """The weights of this checkpoint are random numbers, made by the lavit-hf project for tests and
demonstrations. It loads and runs like a published checkpoint, but its captions, answers and pictures mean nothing.
"""
_NOTICE = """The weights in this directory are random numbers made by the lavit-hf project. They derive from no
published weights and are, like the project, under the Apache License 2.0.
"""


def build(destination: Path) -> None:
    """Converts, and says on the card that the weights are random (`lavit demo` reads that tag)."""
    convert(SOURCE, destination, heads=HEADS, progress=False)
    path = destination / "README.md"
    card = ModelCard.load(path)
    card.data.license = "apache-2.0"
    card.data.tags = sorted({*(card.data.tags or []), "random-weights"} - {"llama2"})
    title, _, rest = card.text.lstrip().partition("\n")
    body, _, _ = rest.partition("## License")
    path.write_text(
        f"---\n{card.data.to_yaml()}\n---\n\n{title}\n\n{_WARNING}{body}## License\n\n{_NOTICE}", encoding="utf-8"
    )
    (destination / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    remove_code(destination)


def remove_code(checkpoint: Path) -> None:
    """Removes the code that `save_pretrained` writes for users without the package, and what names it.

    Checkpoints of this repository are loaded with the package, and generated code does not belong into git.
    """
    for path in checkpoint.rglob("*.py"):
        path.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        path = checkpoint / name
        values = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_auto_map)
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_auto_map(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "auto_map"}


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else DESTINATION)
