"""Sheets of pictures."""

import numpy as np
from PIL import Image

from lavit_hf.utils.contact_sheet import Panel, contact_sheet


def test_long_titles_are_wrapped() -> None:
    pictures = [Image.new("RGB", (100, 50), color) for color in ("red", "blue")]
    short = contact_sheet([[Panel("a", pictures[0])]])
    long = contact_sheet([[Panel("a title that does not fit into one line", pictures[0]), Panel("b", pictures[1])]])
    assert long.height > short.height and long.width > 200
    pixels = np.asarray(long)
    assert (pixels == (255, 0, 0)).all(-1).sum() == (pixels == (0, 0, 255)).all(-1).sum() == 100 * 50
