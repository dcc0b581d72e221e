"""The checkpoint that comes with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "checkpoints" / "lavit-scenes"


def default_checkpoint() -> str:
    """Where the checkpoint is that comes with the package: a small LaVIT that sees and draws pictures of scenes.

    It was trained from nothing by `examples/lavit_scenes`, on pictures of colored shapes (`lavit_hf.data.scenes`); its
    model card tells how well it does. What it knows nothing of, it describes as such shapes.

    Returns:
        A directory for `from_pretrained`.

    Raises:
        FileNotFoundError: The package was installed without it.
    """
    if not (_FOLDER / "config.json").is_file():
        raise FileNotFoundError(
            f"{_FOLDER} has no checkpoint: this installation lacks the package's data. Install lavit-hf again from a "
            "wheel or from a checkout."
        )
    return str(_FOLDER)


__all__ = ["default_checkpoint"]
