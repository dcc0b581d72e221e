"""Pictures of commands: files that are complete or not there."""

from pathlib import Path

import pytest
from PIL import Image

from lavit_cli.pictures import save_picture


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, file, **kwargs) -> None:
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_picture(Image.new("RGB", (20, 10)), tmp_path / "demo.png")
    assert list(tmp_path.iterdir()) == []
