"""What a visitor does on the page, and sees there."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 120  # that something may take on a busy machine

_PIXELS = """
const image = arguments[0], canvas = document.createElement('canvas');
canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
canvas.getContext('2d').drawImage(image, 0, 0);
return canvas.toDataURL('image/png');
"""

_WATCH = """
const name = arguments[0], seen = window.seen = [];
new MutationObserver(() => seen.push(document.getElementById(name)?.innerText)).observe(
    document.body, {subtree: true, childList: true, characterData: true});
"""


class Page:
    """A browser with the page."""

    def __init__(self, browser: Chrome):
        self.browser = browser

    def open(self, url: str, width: int, height: int) -> None:
        # Windows are at least 500 pixels wide; what a page is laid out for can be less.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(url)
        self.wait(lambda: self.find("#picture input[type=file]"))

    def wait(self, is_there: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, SECONDS, 0.1).until(lambda _: is_there())

    def watch(self, name: str) -> Callable[[], str]:
        """Keeps all that a component says from now on, however short it stands there."""
        self.browser.execute_script(_WATCH, name)
        return lambda: self.browser.execute_script("return window.seen.join(' ')")

    def find(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def value(self, name: str) -> str:
        """What stands in a text box."""
        (box,) = self.find(f"#{name} textarea, #{name} input")
        return box.get_attribute("value")

    def text(self, name: str) -> str:
        return " ".join(element.text for element in self.find(f"#{name}"))

    def upload(self, path: Path, name: str = "picture") -> None:
        self.find(f"#{name} input[type=file]")[0].send_keys(str(path))

    def type(self, name: str, text: str) -> None:
        (box,) = self.find(f"#{name} textarea")
        box.clear()
        box.send_keys(text)

    def ask(self, question: str) -> None:
        self.type("question", question)
        self.find("#question textarea")[0].send_keys(Keys.ENTER)

    def move(self, name: str, keys: str) -> None:
        """Moves a slider by keys."""
        self.find(f"#{name} input[type=range]")[0].send_keys(keys)

    def drag(self, name: str, values: range) -> None:
        """Moves a slider to one value after another, as a mouse does, without letting it go."""
        script = (
            "const [slider, value] = arguments;"
            "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(slider, value);"
            "slider.dispatchEvent(new Event('input', {bubbles: true}));"
        )
        for value in values:
            self.browser.execute_script(script, self.find(f"#{name} input[type=range]")[0], value)

    def choose_tab(self, title: str) -> None:
        (tab,) = [button for button in self.find("button[role=tab]") if button.text == title]
        tab.click()

    def click(self, name: str) -> None:
        self.wait(lambda: self.find(f"button#{name}"))[0].click()

    def open_token(self, number: int) -> None:
        """Opens a token of the strip, which may be drawn anew at any time."""
        self.browser.execute_script("document.querySelectorAll('#strip summary')[arguments[0]].click()", number)

    def picture(self, name: str) -> Image.Image | None:
        """The picture that a component shows; `None` if it shows none."""
        images = [image for image in self.find(f"#{name} img") if image.get_property("naturalWidth")]
        if not images:
            return None
        url = self.browser.execute_script(_PIXELS, images[0])
        return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")

    def errors(self) -> str:
        """What the page complains about."""
        return " ".join(toast.text for toast in self.find(".toast-body"))

    def corner(self) -> tuple[int, ...]:
        """The color of the page where nothing stands."""
        return Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB").getpixel((4, 4))

    def screenshot(self, path: Path) -> None:
        """The whole page, as long as it is."""
        size = self.browser.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.browser.save_screenshot(str(path))
