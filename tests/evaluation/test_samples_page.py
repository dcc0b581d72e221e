"""Pages that people look at."""

import base64
import io
import re

from PIL import Image

from lavit_hf.evaluation.samples_page import write_samples_page
from lavit_hf.evaluation.tasks import Shown

RED, BLUE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (400, 200), (0, 0, 255))


def test_right_and_wrong_samples_are_on_the_page(tmp_path):
    shown = [
        Shown([("picture", RED)], [("caption", "a <b> & c")], is_right=True),
        Shown([("picture", BLUE)], [("caption", "long " * 30)], is_right=False),
        Shown([("picture", RED)]),
    ]
    write_samples_page(tmp_path, "3 of 4", shown)
    page = (tmp_path / "samples.html").read_text()
    assert re.findall('<section class="(.*?)">', page) == ["right", "wrong", ""]
    assert "a &lt;b&gt; &amp; c" in page and "<h1>3 of 4</h1>" in page
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall('base64,(.*?)"', page)]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert pictures[1].size == (192, 96)
    sheet = Image.open(tmp_path / "samples.png")
    colors = {color for _, color in sheet.getcolors(sheet.width * sheet.height)}
    assert {(255, 0, 0), (0, 0, 255), (200, 30, 30), (30, 130, 60)} <= colors


def test_the_same_samples_make_the_same_files(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_samples_page(tmp_path / name, "title", [Shown([("one", RED), ("two", BLUE)], [("text", "")])] * 5)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]


def test_texts_of_data_stay_texts(tmp_path):
    evil = '<script>a\nb</script> " \ud800 \x00'
    write_samples_page(tmp_path, evil, [Shown([(evil, RED)], [(evil, evil)])])
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;a b&lt;/script&gt; &quot;") == 5
    assert Image.open(tmp_path / "samples.png").width > 0
