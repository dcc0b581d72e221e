"""The engine without a model: batches, failures, deaths, ends."""

import ctypes
import subprocess
import threading
import time
from itertools import groupby

import pytest
import torch

from lavit_hf.serving.backend import RowWatch
from lavit_hf.serving.engine import Engine, EngineClosed, QueueFull, WorkerDied
from lavit_hf.serving.jobs import (
    CodeOptions,
    ImageJob,
    JobCancelled,
    JobTimeout,
    PixelOptions,
    Prompt,
    TextJob,
    TextOptions,
    TextStream,
)

from .conftest import SECONDS, wait_until


class Fake:
    """A backend that notes what it gets, and waits where it is told to."""

    def __init__(self) -> None:
        self.batches: list[list] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.poison: object = None
        self.draw_with = lambda jobs: [job.finish("a picture") for job in jobs]

    def write(self, jobs) -> None:
        self.batches.append(list(jobs))
        while not self.may_go_on.wait(0.005):  # in short steps, so that what kills a thread gets through
            pass
        if any(job is self.poison for job in jobs):
            raise RuntimeError("out of memory, or so")
        for job in jobs:
            if isinstance(job, TextJob):
                while not job.take(1):
                    pass
                job.complete()
            else:
                job.keep_codes(torch.tensor([1, 2]))

    def draw(self, jobs) -> None:
        self.draw_with(jobs)


def text_job(options=None, seconds=SECONDS, **more) -> TextJob:
    return TextJob(
        Prompt(torch.tensor([1])),
        time.monotonic() + seconds,
        options or TextOptions(),
        3,
        lambda ids: "x" * len(ids),
        [0],
        **more,
    )


def image_job() -> ImageJob:
    options = CodeOptions(1.0, 1, 4)
    return ImageJob(Prompt(torch.tensor([1])), time.monotonic() + SECONDS, options, PixelOptions(), 0)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def engine(fake):
    engine = Engine(fake, max_batch=4, window=0.05, max_queue=16)
    yield engine
    fake.may_go_on.set()
    engine.close(5)


def occupy(fake, engine) -> TextJob:
    """Gives the engine something to do, until it may go on."""
    fake.may_go_on.clear()
    job = text_job(TextOptions(top_k=99))
    engine.submit([job])
    wait_until(lambda: fake.batches and job in fake.batches[-1])
    return job


def test_jobs_of_the_same_options_share_a_batch(fake, engine) -> None:
    first = occupy(fake, engine)
    warm = TextOptions(temperature=1.0)
    jobs = [text_job(), text_job(warm), *(text_job() for _ in range(5)), text_job(warm)]
    engine.submit(jobs)
    fake.may_go_on.set()
    for job in (first, *jobs):
        assert job.future.result(SECONDS).text == "xxx"
    cold = [job for job in jobs if job.options != warm]
    assert fake.batches[1:] == [cold[:4], [jobs[1], jobs[-1]], cold[4:]]


def test_a_batch_waits_for_more_as_long_as_the_window(fake) -> None:
    patient = Engine(fake, max_batch=2, window=3600)
    jobs = [text_job() for _ in range(2)]
    patient.submit(jobs)
    for job in jobs:
        job.future.result(SECONDS)  # a full one waits for nobody
    patient.close()
    engine = Engine(fake, max_batch=2, window=0.4)
    started, job = time.monotonic(), text_job()
    engine.submit([job])
    job.future.result(SECONDS)
    assert time.monotonic() - started >= 0.4
    engine.close()


def test_pixels_are_drawn_while_codes_are_written(fake, engine) -> None:
    picture = image_job()

    def draw(jobs) -> None:
        fake.may_go_on.clear()
        engine.submit([text_job()])
        wait_until(lambda: len(fake.batches) == 2)  # the next batch is at work while this one is drawn
        fake.may_go_on.set()
        jobs[0].finish("drawn")

    fake.draw_with = draw
    engine.submit([picture])
    assert picture.future.result(SECONDS) == "drawn"


def test_a_failure_costs_its_job_alone(fake, engine, caplog) -> None:
    first = occupy(fake, engine)
    jobs = [text_job() for _ in range(3)]
    fake.poison = jobs[1]
    engine.submit(jobs)
    fake.may_go_on.set()
    for job in (jobs[0], jobs[2], first):
        assert job.future.result(SECONDS).text == "xxx"
    with pytest.raises(WorkerDied, match="RuntimeError"):
        jobs[1].future.result(SECONDS)
    assert engine.is_healthy and "out of memory, or so" in caplog.text


def test_what_was_seen_is_not_written_again(fake, engine) -> None:
    seen = []

    def write(jobs) -> None:
        fake.batches.append(list(jobs))
        for job in jobs:
            job.take(1)
        if len(fake.batches) == 1:
            raise RuntimeError
        for job in jobs:
            job.complete()

    fake.write = write
    streamed, whole = text_job(report=seen.append), text_job()
    engine.submit([streamed, whole])
    with pytest.raises(WorkerDied):
        streamed.future.result(SECONDS)
    assert seen == ["x"] and whole.future.result(SECONDS).usage.new_tokens == 1


def test_a_killed_worker_costs_its_batch_and_comes_back(fake, engine) -> None:
    victim = occupy(fake, engine)
    waiting = text_job()
    engine.submit([waiting])
    old = engine.writer.thread
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(old.ident), ctypes.py_object(SystemExit))
    with pytest.raises(WorkerDied, match="SystemExit"):
        victim.future.result(SECONDS)
    fake.may_go_on.set()
    assert waiting.future.result(SECONDS).text == "xxx"
    assert engine.writer.thread is not old and engine.is_healthy
    assert engine.metrics.registry.get_sample_value("lavit_worker_restarts_total", {"worker": "writer"}) == 1


def test_health_tells_of_a_worker_that_always_fails(fake, engine) -> None:
    for _ in range(3):
        assert engine.is_healthy
        fake.poison = text_job()
        engine.submit([fake.poison])
        with pytest.raises(WorkerDied):
            fake.poison.future.result(SECONDS)
    wait_until(lambda: not engine.is_healthy)
    well = text_job()
    engine.submit([well])
    well.future.result(SECONDS)
    wait_until(lambda: engine.is_healthy)  # noticed after the answer


def test_a_request_for_many_answers_is_one_failure(fake, engine) -> None:
    def fail(jobs) -> None:
        raise RuntimeError("out of memory, or so")

    fake.write, right = fail, fake.write
    jobs = [text_job() for _ in range(4)]
    engine.submit(jobs)
    for job in jobs:
        with pytest.raises(WorkerDied):
            job.future.result(SECONDS)
    fake.write = right
    well = text_job()
    engine.submit([well])
    well.future.result(SECONDS)
    assert engine.is_healthy
    assert engine.metrics.registry.get_sample_value("lavit_batch_failures_total", {"worker": "writer"}) >= 4


def test_an_unfinished_job_is_an_error(fake, engine) -> None:
    fake.write = lambda jobs: None
    job = text_job()
    engine.submit([job])
    with pytest.raises(WorkerDied):
        job.future.result(SECONDS)


def test_cancelled_and_late_jobs_are_not_begun(fake, engine) -> None:
    occupy(fake, engine)
    cancelled, late = text_job(), text_job(seconds=0.01)
    engine.submit([cancelled, late])
    cancelled.cancel()
    time.sleep(0.02)
    fake.may_go_on.set()
    with pytest.raises(JobCancelled):
        cancelled.future.result(SECONDS)
    with pytest.raises(JobTimeout):
        late.future.result(SECONDS)
    assert len(fake.batches) == 1


def test_rows_stop_when_nobody_waits() -> None:
    job = text_job()
    assert not job.take(1)
    job.cancel()
    assert job.take(1) and job.usage.new_tokens == 1
    late = text_job(seconds=-1.0)
    assert late.take(1)


def test_too_many_are_refused_all_or_none(fake, engine) -> None:
    occupy(fake, engine)
    engine.submit([text_job() for _ in range(15)])
    with pytest.raises(QueueFull) as refusal:
        engine.submit([text_job()])
    assert refusal.value.retry_after >= 1 and engine.size == 16


def test_those_who_left_keep_nobody_out(fake, engine) -> None:
    """Clients that gave up and asked again were told for a whole batch that there are too many of them."""
    occupy(fake, engine)
    left = [text_job() for _ in range(15)]
    engine.submit(left)
    for job in left:
        job.cancel()
    engine.submit([text_job() for _ in range(15)])
    assert all(job.future.done() for job in left) and engine.size == 16


def test_a_row_that_ends_is_answered_before_its_batch() -> None:
    short, long = text_job(), text_job()
    short.max_tokens, long.max_tokens = 1, 2
    watch = RowWatch([short, long])
    assert watch(torch.tensor([[5], [5]]), None).tolist() == [True, False]
    assert short.future.result(0).text == "x" and not long.future.done()
    assert watch(torch.tensor([[5, 5], [5, 5]]), None).tolist() == [True, True]
    assert long.future.result(0).text == "xx"


def test_an_answer_frees_its_place_at_once(fake) -> None:
    """Whoever has an answer may ask again, even while the worker still tidies up after the batch."""
    is_tidy = threading.Event()
    write = fake.write

    def write_and_tidy(jobs) -> None:
        write(jobs)
        is_tidy.wait(SECONDS)

    fake.write = write_and_tidy
    engine = Engine(fake, max_queue=1)
    for job in (text_job(), text_job()):
        engine.submit([job])
        assert job.future.result(SECONDS).text == "xxx" and engine.size == 0
        is_tidy.set()
    engine.close(5)


def test_a_picture_takes_one_place_while_it_goes_from_hand_to_hand(fake, engine) -> None:
    sizes, was_counted, put = [], threading.Event(), engine.pixels.put

    def put_and_count(job) -> None:
        put(job)
        sizes.append(engine.size)
        was_counted.set()

    def draw(jobs) -> None:
        was_counted.wait(SECONDS)
        jobs[0].finish("drawn")

    fake.draw_with, engine.pixels.put = draw, put_and_count
    picture = image_job()
    engine.submit([picture])
    assert picture.future.result(SECONDS) == "drawn" and sizes == [1]


def test_a_job_has_its_place_whatever_its_worker_does_with_it(fake, engine) -> None:
    """The end of the engine would not wait for it otherwise."""
    sizes = []

    class Counting(TextJob):
        @property
        def is_over(self) -> bool:
            sizes.append(engine.size)
            return super().is_over

    job = Counting(Prompt(torch.tensor([1])), time.monotonic() + SECONDS, TextOptions(), 3, str, [0])
    engine.submit([job])
    job.future.result(SECONDS)
    assert sizes[0] == 1 and set(sizes[:3]) == {1}


def test_the_end_waits_for_what_was_taken(fake, engine) -> None:
    jobs = [occupy(fake, engine), text_job(), image_job()]
    engine.submit(jobs[1:])
    closing = threading.Thread(target=engine.close, args=(20,))
    closing.start()
    wait_until(lambda: engine._is_closed)
    with pytest.raises(EngineClosed):
        engine.submit([text_job()])
    fake.may_go_on.set()
    assert [job.future.result(SECONDS) is not None for job in jobs] == [True] * 3
    closing.join(SECONDS)
    assert not engine.writer.thread.is_alive() and not engine.pixels.thread.is_alive()


def test_the_end_does_not_wait_for_ever(fake, engine) -> None:
    occupy(fake, engine)
    waiting = text_job()
    engine.submit([waiting])
    waiting.future.add_done_callback(lambda _: fake.may_go_on.set())  # the batch at work ends after that
    engine.close(0.1)
    with pytest.raises(EngineClosed):
        waiting.future.result(SECONDS)


def test_bytes_wait_for_those_that_follow() -> None:
    """As tokenizers that fall back on bytes have it: in a row of them, one that makes no character spoils all."""

    def decode(ids: list[int]) -> str:
        return "".join(
            "\ufffd" * len(run) if is_byte and b"\xff" in run else run.decode()
            for is_byte, run in (
                (is_byte, bytes(x % 256 for x in run)) for is_byte, run in groupby(ids, lambda x: x < 256)
            )
        )

    for ids in ([256 + 97, 105, 68, 0xFF, 256 + 97], [105, 68, 256 + 97, 0xC3, 0xA9]):
        stream = TextStream(decode, byte_ids=range(256))
        given = ""
        for one in ids:
            stream.ids.append(one)
            given += stream.new_text()
        assert given + stream.new_text(is_end=True) == decode(ids)


@pytest.mark.parametrize("stop", [(), ("st",), ("b c",), ("zzz",), ("é",)])
def test_streams_never_take_back(stop: tuple[str, ...]) -> None:
    data = " a  b c\n sté "
    raw = data.encode()
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), stop)
    given = ""
    for byte in raw:
        stream.ids.append(byte)
        given += stream.new_text()
        if stream.is_stopped:
            break
    given += stream.new_text(is_end=True)
    ends = [data.strip().find(word) for word in stop if word in data]
    assert given == (data.strip()[: min(ends)].rstrip() if ends else data.strip())
    assert given == stream.text(is_end=True)


def test_what_is_missing_is_named(python: str) -> None:
    code = "import sys; sys.modules['starlette'] = None; import lavit_hf.serving"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert result.stderr.endswith("Serving needs the package `starlette`: pip install 'lavit-hf[serving]'\n")
