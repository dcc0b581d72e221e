"""A checkpoint at work, its page in a process of its own, and browsers.

`make test-web` runs these tests: they need Chromium and its driver, and packages of the extra `test-web`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from selenium import webdriver

from lavit_hf import default_checkpoint
from lavit_hf.data.scenes import PortableRng
from lavit_hf.web import Studio, make_examples, world_of
from web.page import SECONDS, Page

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "lavit-tiny-random"
# Chromium looks for servers that this machine may not reach, unless it is told not to.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--force-prefers-reduced-motion",
)


@pytest.fixture(scope="session")
def studio() -> Studio:
    """The checkpoint that comes with the package. Do not change it."""
    return Studio.from_pretrained(default_checkpoint(), make_examples(world_of(default_checkpoint())).known)


@pytest.fixture(scope="session")
def scene() -> Any:
    """A scene of its world that no page offers."""
    world = world_of(default_checkpoint())
    return world.sample_scene(world.splits[1], 7, 3)


@pytest.fixture(scope="session")
def picture(scene: Any) -> Image.Image:
    return world_of(default_checkpoint()).render(scene)


@pytest.fixture(scope="session")
def question(scene: Any) -> str:
    """What can be asked about it."""
    return world_of(default_checkpoint()).ask_questions(scene, PortableRng(0, 0))[-2][0]


@pytest.fixture(scope="session")
def picture_file(picture: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    picture.save(path)
    return path


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Where `lavit demo --web` shows its page."""
    command = [sys.executable, "-m", "lavit_cli", "demo", "--web", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT / "src", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("The page is at http://127.0.0.1:"):
        process.kill()
        pytest.fail(line + process.communicate()[1])
    yield line.split()[4]
    process.terminate()
    process.communicate(timeout=SECONDS)


@pytest.fixture
def open_page(address: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Page]]:
    """Opens the page in a browser of its own."""
    browsers = []

    def start(width: int = 1100, height: int = 1500, theme: str = "light") -> Page:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        for flag in (*_FLAGS, f"--window-size={width},{height}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
        browsers.append(webdriver.Chrome(options=options, service=service))
        page = Page(browsers[-1])
        page.open(f"{address}?__theme={theme}", width, height)
        return page

    yield start
    for browser in browsers:
        browser.quit()


@pytest.fixture(autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)
