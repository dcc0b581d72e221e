"""How many visitors may wait, and what becomes of one more; with a model that takes its time."""

import threading
import time

import pytest
from gradio_client import Client, handle_file

from lavit_hf.web import VISITORS, Studio, create_demo, given_examples, launch
from web.conftest import ROOT


class SlowStudio(Studio):
    """Answers when it is told to."""

    def __init__(self, studio: Studio):
        super().__init__(studio.model, studio.processor)
        self.may_answer = threading.Event()

    def answer(self, image, question, num_tokens=None):
        assert self.may_answer.wait(60)
        yield f"answer to {question}"


def test_twenty_visitors_wait_and_the_next_is_told(studio: Studio) -> None:
    slow = SlowStudio(studio)
    demo = create_demo(slow, given_examples(studio.known_pictures[:1], "Why?", "a hat"), "slow")
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True, server_port=None)
    try:
        client = Client(url, verbose=False)
        file = handle_file(str(ROOT / "examples" / "images" / "scene.png"))
        first = client.submit(file, "0", 0, api_name="/ask")
        while not any(event for event in demo._queue.active_jobs if event):
            time.sleep(0.05)
        waiting = [client.submit(file, str(number), 0, api_name="/ask") for number in range(1, VISITORS + 1)]
        while len(demo._queue) < VISITORS:
            time.sleep(0.05)
        with pytest.raises(Exception, match="Queue is full"):
            client.predict(file, "one too many", 0, api_name="/ask")
        slow.may_answer.set()
        assert [job.result(60) for job in (first, *waiting)] == [f"answer to {number}" for number in range(21)]
    finally:
        slow.may_answer.set()
        demo.close()


def test_files_of_this_machine_are_nobodys_pictures(studio: Studio) -> None:
    """A client may name any path; only what was uploaded is opened."""
    demo = create_demo(studio, given_examples(studio.known_pictures[:1], "Why?", "a hat"), "tiny")
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        secret = {"path": str(ROOT / "examples" / "images" / "scene.png"), "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(Exception, match=r"(?i)cannot move|not allowed|invalid|error"):
            client.predict(secret, 0, api_name="/caption")
        assert client.predict(handle_file(secret["path"]), 0, api_name="/caption")
    finally:
        demo.close()
