"""Writes the model card of a trained checkpoint: its text, the facts that its files tell, and what was measured.

Run it after `lavit evaluate`:

    python examples/worlds/write_card.py --checkpoint out/lavit-scenes/checkpoint --name lavit-scenes \
        --text examples/lavit_scenes/model_card.md --metrics out/lavit-scenes/evaluation/metrics.json
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCardData

from lavit_hf.hub import Origin, prepare
from lavit_hf.training import exit_on_write_errors


def main(arguments: list[str] | None = None) -> None:
    """Writes `README.md` and `metrics.json` into the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of assemble.py")
    parser.add_argument("--name", required=True, help="name of the checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="what the card says, in Markdown")
    parser.add_argument("--metrics", type=Path, required=True, help="what lavit evaluate measured")
    args = parser.parse_args(arguments)
    metrics = json.loads(args.metrics.read_text(encoding="utf-8"))
    # Where it was evaluated is nobody's business, and differs from machine to machine.
    for part in (metrics, *metrics["results"]):
        part["checkpoint"] = args.name
    (args.checkpoint / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    text = args.text.read_text(encoding="utf-8")
    data = ModelCardData(license="apache-2.0")
    (args.checkpoint / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
    with prepare(args.checkpoint, args.name, Origin()) as publication:
        shutil.copyfile(publication.files["README.md"], args.checkpoint / "README.md")


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
