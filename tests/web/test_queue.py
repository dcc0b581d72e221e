"""How many visitors may wait, and what becomes of one more; with a model that takes its time."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable

import pytest
from gradio_client import Client, handle_file
from gradio_client.utils import Status

from lavit_hf.web import VISITORS, Studio, create_demo, given_examples, launch
from web.conftest import ROOT
from web.page import SECONDS


class SlowStudio(Studio):
    """Answers when it is told to."""

    def __init__(self, studio: Studio):
        super().__init__(studio.model, studio.processor)
        self.may_answer = threading.Event()

    def answer(self, image, question, num_tokens=None):
        assert self.may_answer.wait(10 * SECONDS)
        yield f"answer to {question}"


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_twenty_visitors_wait_and_the_next_is_told(studio: Studio) -> None:
    slow = SlowStudio(studio)
    demo = create_demo(slow, given_examples(studio.known_pictures[:1], "Why?", "a hat"), "slow")
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True, server_port=None)
    try:
        client = Client(url, verbose=False)
        file = handle_file(str(ROOT / "examples" / "images" / "scene.png"))
        first = client.submit(file, "0", 0, api_name="/ask")
        until(lambda: first.status().code in (Status.PROCESSING, Status.ITERATING))
        waiting = [client.submit(file, str(number), 0, api_name="/ask") for number in range(1, VISITORS + 1)]
        until(lambda: all(job.status().code == Status.IN_QUEUE for job in waiting))
        with pytest.raises(Exception, match="Queue is full"):
            client.predict(file, "one too many", 0, api_name="/ask")
        slow.may_answer.set()
        answers = [job.result(SECONDS) for job in (first, *waiting)]
        assert answers == [f"answer to {number}" for number in range(VISITORS + 1)]
    finally:
        slow.may_answer.set()
        demo.close()


def test_files_of_this_machine_are_nobodys_pictures(studio: Studio) -> None:
    """A client may name any path; only what was uploaded is opened."""
    demo = create_demo(studio, given_examples(studio.known_pictures[:1], "Why?", "a hat"), "tiny")
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        path = str(ROOT / "examples" / "images" / "scene.png")
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 0]}
        call = f"{url}gradio_api/call/caption"
        request = urllib.request.Request(call, json.dumps(data).encode(), {"Content-Type": "application/json"})
        event = json.load(urllib.request.urlopen(request))["event_id"]
        told = urllib.request.urlopen(f"{call}/{event}", timeout=SECONDS).read().decode()
        assert "event: error" in told and "event: complete" not in told
        assert Client(url, verbose=False).predict(handle_file(path), 0, api_name="/caption")  # which uploads it
    finally:
        demo.close()
