"""The card that comes with lavit-emoji-small is what its script writes."""

import importlib
import shutil
from pathlib import Path

import pytest

from lavit_hf import default_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_committed_card_is_written_by_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    committed = Path(default_checkpoint())
    checkpoint = shutil.copytree(committed, tmp_path / "lavit-emoji-small")
    for name in ("README.md", "metrics.json"):
        (checkpoint / name).unlink()
    arguments = ["--checkpoint", str(checkpoint), "--name", "lavit-emoji-small"]
    arguments += ["--metrics", str(committed / "metrics.json")]
    arguments += ["--text", str(EXAMPLES / "lavit_emoji/small/model_card.md")]
    importlib.import_module("worlds.write_card").main(arguments)
    for name in ("README.md", "metrics.json"):
        assert (checkpoint / name).read_text(encoding="utf-8") == (committed / name).read_text(encoding="utf-8")
