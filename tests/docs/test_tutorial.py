"""The tutorial runs from its first line to its last, as its notebook would, and what it promises is there.

`docs/tutorial.ipynb` is the same page as a notebook: `jupytext --to ipynb docs/tutorial.md` makes it.
"""

import json
from pathlib import Path

import jupytext
import nbformat

from docs.test_documents import ROOT, TUTORIAL, checkout, run  # noqa: F401 - the third is a fixture
from zygote import Zygote

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_the_tutorial_runs(checkout: Path, zygote: Zygote) -> None:  # noqa: F811
    """One process runs all cells; those in bash start processes of their own, in the same directory."""
    program = ["import subprocess"]
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            is_bash = cell.source.startswith("%%bash\n")
            bash = f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {cell.source[7:]!r}], check=True)"
            program.append(bash if is_bash else cell.source)
    assert any("lavit publish" in cell for cell in program)
    printed = run([str(zygote.folder / "python"), "-c", "\n".join(program)], checkout, zygote.folder, seconds=3600)
    out = checkout / "out"
    assert "Would publish me/my-lavit" in printed and "Would publish the Space me/try-my-lavit" in printed
    captions = [line.partition("\t") for line in printed.splitlines() if line.startswith("out/stickers/validation/")]
    named = [Path(path).stem.split("-")[:2] for path, _, _ in captions]
    right = [
        text == f"a {thing} on {background}" for (thing, background), (_, _, text) in zip(named, captions, strict=True)
    ]
    # 14 before, of which none has these words, and 14 after.
    assert len(right) == 28 and sum(right[:14]) == 0 and sum(right[14:]) >= 12
    for name in (
        "curves.png",
        "stickers-measured/curve.png",
        "my-lavit/model_index.json",
        "cat.png",
        "rocket-after.png",
    ):
        assert (out / name).is_file(), name
    log = json.loads((out / "stickers-lora" / "checkpoint-60" / "trainer_state.json").read_text())["log_history"]
    losses = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    metrics = json.loads((out / "stickers-measured" / "tokens-own" / "metrics.json").read_text())
    assert metrics["results"][0]["num_samples"] == 14


def test_the_notebook_is_the_tutorial() -> None:
    notebook, page = nbformat.read(NOTEBOOK, as_version=4), jupytext.read(ROOT / TUTORIAL)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in page.cells
    ]
