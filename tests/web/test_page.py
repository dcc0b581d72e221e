"""The page in a real browser: upload, ask, draw, move the slider, wrong files, two visitors, small and dark screens.

With `SCREENSHOTS=folder`, it leaves there what it looks like.
"""

import os
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from lavit_hf import default_checkpoint
from lavit_hf.web import Studio, make_examples, world_of
from web.page import Page

EXAMPLES = make_examples(world_of(default_checkpoint()))
SCREENSHOTS = os.environ.get("SCREENSHOTS")


def last(texts) -> str:
    return list(texts)[-1]


def wait_for(page: Page, name: str, text: str) -> None:
    page.wait(lambda: page.value(name) == text)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def test_a_picture_is_read_asked_about_and_drawn_again(
    open_page, studio: Studio, picture: Image.Image, question: str, picture_file: Path
) -> None:
    page = open_page()
    page.upload(picture_file)
    wait_for(page, "caption", last(studio.caption(picture)))
    look = studio.look(picture)
    page.wait(lambda: same(page.picture("overlay") or picture, look.overlay))
    assert page.text("cost").startswith(f"{look.num_tokens} of {look.num_patches} patches became tokens")

    page.ask(question)
    wait_for(page, "answer", last(studio.answer(picture, question)))

    tokens = page.find("#strip summary")
    assert [token.text for token in tokens] == [str(token.index) for token in look.tokens]
    shown = next(number for number, token in enumerate(look.tokens) if token.known)
    tokens[shown].click()
    tokens[0 if shown else 1].click()  # opening one closes the other
    (opened,) = page.find("#strip details[open] > div")
    assert f"Id {look.tokens[0 if shown else 1].index}, code" in opened.text
    tokens[shown].click()
    (opened,) = page.find("#strip details[open] > div")
    known = page.find("#strip details[open] .lavit-known")
    assert f"Patch {look.tokens[shown].patch}:" in opened.text and len(known) == min(4, len(look.tokens[shown].known))
    assert known[0].value_of_css_property("background-image").startswith('url("data:image/png')

    seen = page.watch("again")
    page.click("redraw")
    page.wait(lambda: re.search(r"Drawing - \d", seen()))  # it says how far it is
    assert same(page.wait(lambda: page.picture("again")), studio.redraw(picture).image)
    assert page.errors() == ""
    if SCREENSHOTS:
        page.screenshot(Path(SCREENSHOTS) / "web.png")


def test_a_slider_redraws_while_it_moves(open_page, studio: Studio, picture: Image.Image, picture_file: Path) -> None:
    page = open_page()
    page.upload(picture_file)
    page.wait(lambda: page.picture("overlay"))
    seen = set()
    for most in range(4, studio.num_patches, studio.num_patches // 6):
        page.drag("budget", range(most - 3, most + 1))
        page.wait(lambda most=most: page.text("cost").startswith(f"{most} of "))
        page.wait(lambda most=most: len(page.find("#strip summary")) == most)
        seen.add(page.wait(lambda: page.picture("overlay")).tobytes())
        budget = most
    assert len(seen) > 3
    page.wait(lambda: same(page.picture("overlay") or picture, studio.look(picture, budget).overlay))
    wait_for(page, "caption", last(studio.caption(picture, budget)))
    page.ask(EXAMPLES.questions[0])
    wait_for(page, "answer", last(studio.answer(picture, EXAMPLES.questions[0], budget)))
    page.drag("budget", range(1))
    page.wait(lambda: page.text("cost").startswith(f"{studio.look(picture).num_tokens} of "))


def test_drawing(open_page, studio: Studio, picture: Image.Image, picture_file: Path) -> None:
    page = open_page()
    page.choose_tab("Draw a picture")
    page.click("draw")
    page.wait(lambda: "The prompt is empty" in page.errors())
    prompt = EXAMPLES.prompts[0]
    page.type("prompt", prompt)
    page.drag("steps", range(6, 7))
    page.drag("guidance", range(2, 3))
    page.click("draw")
    drawing = page.wait(lambda: page.picture("drawing"))
    drawn = studio.draw(prompt, seed=0, guidance_scale=2, num_inference_steps=6)
    assert same(drawing, drawn.image)
    assert page.text("facts").startswith(f"{drawn.num_tokens} tokens, ")
    page.upload(picture_file, "pictures")
    page.wait(lambda: page.find("#pictures img"))
    page.click("draw")
    expected = studio.draw(prompt, [picture], seed=0, guidance_scale=2, num_inference_steps=6).image
    page.wait(lambda: same(page.picture("drawing") or picture, expected))
    if SCREENSHOTS:
        page.screenshot(Path(SCREENSHOTS) / "draw.png")


def test_wrong_files_are_refused_in_words(open_page, picture_file: Path, tmp_path: Path) -> None:
    page = open_page()
    (tmp_path / "half.png").write_bytes(picture_file.read_bytes()[:80])
    (tmp_path / "words.png").write_text("These are words.")
    messages = {"half.png": "half.png: Cannot decode an image", "words.png": "Cannot read words.png as an image"}
    for name, message in messages.items():
        page.upload(tmp_path / name)
        page.wait(lambda message=message: message in page.errors())
        assert str(tmp_path) not in page.errors() and "/tmp" not in page.errors()
        page.browser.refresh()
        page.wait(lambda: page.find("#picture input[type=file]"))
    (tmp_path / "words.txt").write_text("These are words.")
    page.upload(tmp_path / "words.txt")
    page.wait(lambda: "Invalid file type" in page.errors())
    assert page.value("caption") == "" and page.picture("overlay") is None
    page.ask("What is this?")
    page.wait(lambda: "Choose a picture first" in page.errors())
    page.upload(picture_file)  # all is well again
    page.wait(lambda: page.value("caption"))


def test_two_visitors_at_once_see_their_own(open_page, studio: Studio, tmp_path: Path) -> None:
    pages, pictures = [open_page(), open_page()], EXAMPLES.pictures[:2]
    for number, one in enumerate(pictures):
        one.save(tmp_path / f"{number}.png")
    for number, page in enumerate(pages):
        page.upload(tmp_path / f"{number}.png")
    for page in pages:
        page.ask(EXAMPLES.questions[0])
    for page, one in zip(pages, pictures, strict=True):
        wait_for(page, "caption", last(studio.caption(one)))
        wait_for(page, "answer", last(studio.answer(one, EXAMPLES.questions[0])))
        page.wait(lambda page=page, one=one: same(page.picture("overlay") or one, studio.look(one).overlay))


@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (1100, "dark")])
def test_small_and_dark_screens(open_page, picture_file: Path, width: int, theme: str) -> None:
    page = open_page(width, 844, theme)
    page.upload(picture_file)
    page.wait(lambda: page.value("caption"))
    page.wait(lambda: len(page.find("#strip summary")) > 1)
    page.open_token(1)
    wide = page.browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width  # nothing has to be scrolled sideways
    lowest = (
        "Math.max(...[...document.querySelectorAll('#strip summary')].map(one => one.getBoundingClientRect().bottom))"
    )
    told = "document.querySelector('#strip details[open] > div').getBoundingClientRect().top"
    assert page.browser.execute_script(f"return {told} - {lowest}") >= 0  # what is told of a token hides no other one
    assert (max(page.corner()) < 80) == (theme == "dark")
    if SCREENSHOTS:
        page.screenshot(Path(SCREENSHOTS) / f"{theme}-{width}.png")
