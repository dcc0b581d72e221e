"""The engine: two workers, each a thread with a queue of its own, that work on jobs in batches.

One writes text and visual codes, the other draws pixels: codes of the next batch are written while pixels of the last
are drawn. Jobs join a batch as long as it has not begun. (`generate_batch` of transformers, which lets them join
later, takes ids alone: no images, and no second row per prompt, which guidance needs.)

What is worked on, a [`Backend`] knows; one that hands jobs to a server of language models has the same two methods.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .jobs import ImageJob, Job, TextJob

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3  # in a row, after which a worker counts as broken
_POLL_SECONDS = 0.05


class EngineClosed(Exception):
    """The engine takes no jobs any more."""


class WorkerDied(Exception):
    """What worked on a job has failed."""


class QueueFull(Exception):
    """There is no room for more jobs.

    Args:
        retry_after: Seconds after which there may be.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"Too many requests are waiting; try again in {retry_after} s.")
        self.retry_after = retry_after


class Backend(Protocol):
    """What works on batches."""

    def write(self, jobs: Sequence[TextJob] | Sequence[ImageJob]) -> None:
        """Writes text, or the codes of images, of jobs with the same key.

        It gives every id to the `take` of its job, completes jobs of text, and gives those of images their codes.
        """

    def draw(self, jobs: Sequence[ImageJob]) -> None:
        """Draws and finishes images, of jobs with the same key that have codes."""


@dataclass
class Metrics:
    """What Prometheus is told.

    Args:
        registry: Where the numbers go.
    """

    registry: CollectorRegistry

    def __post_init__(self) -> None:
        def new(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"lavit_{name}", text, labels, registry=self.registry, **options)

        sizes, times = (1, 2, 4, 8, 16, 32, 64), (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.requests = new(Counter, "requests", "Requests answered.", "path", "status")
        self.seconds = new(Histogram, "request_seconds", "Time from request to answer.", "path", buckets=times)
        self.in_flight = new(Gauge, "requests_in_flight", "Requests that are not answered yet.")
        self.waiting = new(Gauge, "jobs_waiting", "Jobs that no batch has taken yet.", "worker")
        self.running = new(Gauge, "jobs_running", "Jobs of the batch at work.", "worker")
        self.batches = new(Histogram, "batch_jobs", "Jobs of a batch.", "worker", buckets=sizes)
        self.work = new(Histogram, "batch_seconds", "Time for a batch.", "worker", buckets=times)
        self.failures = new(Counter, "batch_failures", "Batches that failed.", "worker")
        self.restarts = new(Counter, "worker_restarts", "Workers that died and were started again.", "worker")
        self.tokens = new(Counter, "tokens", "Tokens of finished jobs.", "kind")
        self.pictures = new(Counter, "pictures", "Pictures drawn.")


class Worker:
    """A thread that works on batches of jobs.

    If its work fails, it costs the jobs of that batch an error and nothing else: of several jobs each is tried once
    more by itself. If the thread dies, another one takes its place.

    Args:
        name: Of the worker in logs and metrics.
        work: Works on a batch.
        max_batch: Most jobs of one.
        window: Seconds for which a batch waits for more jobs after its first.
        metrics: Where numbers go.
    """

    def __init__(
        self, name: str, work: Callable[[list[Any]], None], max_batch: int, window: float, metrics: Metrics
    ) -> None:
        self.name = name
        self._work = work
        self._max_batch = max_batch
        self._window = window
        self._metrics = metrics
        self._waiting: deque[tuple[float, Job]] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._failures = 0
        self._seconds = 1.0  # for a batch, on average
        self.thread = self._start()

    @property
    def is_healthy(self) -> bool:
        """Whether it works."""
        return self.thread.is_alive() and self._failures < _MOST_FAILURES

    @property
    def wait_seconds(self) -> int:
        """About how long it takes until a batch is done, and those that wait before it."""
        return min(max(math.ceil(self._seconds * (1 + len(self._waiting) / self._max_batch)), 1), 60)

    def put(self, job: Job) -> None:
        """Adds a job, which fails if the worker takes none any more."""
        with self._changed:
            if not self._is_closed:
                self._waiting.append((time.monotonic(), job))
                self._metrics.waiting.labels(self.name).set(len(self._waiting))
                self._changed.notify_all()
                return
        job.fail(EngineClosed())

    def drop_over(self) -> None:
        """Ends jobs that wait here, while nobody waits for them any more."""
        with self._changed:
            self._drop_over()

    def close(self) -> None:
        """Ends the thread after the batch at work; jobs that wait fail."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for _, job in waiting:
            job.fail(EngineClosed())
        for job in self._running:
            job.cancel()
        self.thread.join(timeout=10)

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._live, name=f"lavit-{self.name}", daemon=True)
        thread.start()
        return thread

    def _live(self) -> None:
        try:
            while self._work_on_next():  # a call, so that nothing of a batch stays here while the next is waited for
                pass
        except BaseException as error:  # even what ends a thread ends no more than that
            logger.exception("The worker %r died", self.name)
            self._fail(self._running, error)
            self._failures += 1
            self._metrics.restarts.labels(self.name).inc()
            with self._changed:
                self._running = []
                if not self._is_closed:
                    self.thread = self._start()

    def _work_on_next(self) -> bool:
        batch = self._next_batch()
        if batch:
            self._process(batch)
        return bool(batch)

    def _next_batch(self) -> list[Job]:
        """Waits for jobs, and takes those that go with the oldest; none once the worker is closed."""
        with self._changed:
            while True:
                if self._is_closed:
                    return []
                self._drop_over()
                if not self._waiting:
                    self._changed.wait()
                    continue
                arrived, oldest = self._waiting[0]
                batch = [job for _, job in self._waiting if job.key == oldest.key][: self._max_batch]
                left = arrived + self._window - time.monotonic()
                if len(batch) < self._max_batch and left > 0:
                    self._changed.wait(left)
                    continue
                taken = set(map(id, batch))
                self._waiting = deque(entry for entry in self._waiting if id(entry[1]) not in taken)
                self._metrics.waiting.labels(self.name).set(len(self._waiting))
                self._running = batch
                return batch

    def _drop_over(self) -> None:
        entries, self._waiting = self._waiting, deque()
        for entry in entries:
            if entry[1].is_over:
                entry[1].give_up()
            else:
                self._waiting.append(entry)
        self._metrics.waiting.labels(self.name).set(len(self._waiting))

    def _process(self, batch: list[Job]) -> None:
        started = time.monotonic()
        self._metrics.running.labels(self.name).set(len(batch))
        self._metrics.batches.labels(self.name).observe(len(batch))
        # Jobs that fail by themselves, too, are one failure, or a request for many answers would be many.
        self._failures = 0 if self._try(batch) else self._failures + 1
        seconds = time.monotonic() - started
        self._metrics.work.labels(self.name).observe(seconds)
        self._metrics.running.labels(self.name).set(0)
        self._seconds += 0.2 * (seconds - self._seconds)
        self._running = []

    def _try(self, batch: list[Job]) -> bool:
        """Works on a batch, and on each job by itself if that fails; returns whether anything worked."""
        has_worked = False
        try:
            self._work(batch)
            has_worked = True
        except Exception as error:
            logger.exception("A batch of %d jobs failed in the worker %r", len(batch), self.name)
            self._metrics.failures.labels(self.name).inc()
            # One of them may have spoiled it for the rest, or together they were too large. What a client has seen of
            # a job cannot be taken back.
            again = [job for job in batch if len(batch) > 1 and not job.has_reported and not job.is_over]
            self._fail([job for job in batch if job not in again], error)
            for job in again:
                job.restart()
                has_worked |= self._try([job])
        for job in batch:
            if job.is_over:
                job.give_up()  # no more than a formality where it is finished
        return has_worked

    @staticmethod
    def _fail(jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            failure = WorkerDied(f"The server failed while it worked on this: {type(error).__name__}.")
            failure.__cause__ = error
            job.fail(failure)


class Engine:
    """Takes jobs, and works on them in batches.

    Args:
        backend: What works on them.
        max_batch: Most jobs that are written at once.
        max_draw_batch: Most pictures whose pixels are drawn at once; by default as many.
        window: Seconds for which a batch waits for more jobs after its first.
        max_queue: Most jobs at a time.
        metrics: Where numbers go.
    """

    def __init__(
        self,
        backend: Backend,
        max_batch: int = 8,
        max_draw_batch: int | None = None,
        window: float = 0.01,
        max_queue: int = 256,
        metrics: Metrics | None = None,
    ) -> None:
        self.metrics = metrics or Metrics(CollectorRegistry())
        self._backend = backend
        self._max_queue = max_queue
        self._is_closed = False
        self._open: set[Job] = set()  # jobs until they are done, whichever worker has them
        self._lock = threading.Lock()  # of these two
        draw_batch = max_batch if max_draw_batch is None else max_draw_batch
        self.pixels = Worker("pixels", backend.draw, draw_batch, window, self.metrics)
        self.writer = Worker("writer", self._write, max_batch, window, self.metrics)

    @property
    def size(self) -> int:
        """Jobs that wait or run; one whose answer is there is neither, though its batch may not be over yet."""
        with self._lock:
            return self._count_open()

    @property
    def is_healthy(self) -> bool:
        """Whether it takes jobs and its workers work."""
        return not self._is_closed and self.writer.is_healthy and self.pixels.is_healthy

    def submit(self, jobs: Sequence[TextJob | ImageJob]) -> None:
        """Takes the jobs of a request, all or none.

        Raises:
            EngineClosed: The engine takes none any more.
            QueueFull: There are too many already.
        """
        for worker in (self.writer, self.pixels):
            worker.drop_over()  # or they would take the place of those that clients have asked for since
        with self._lock:
            if self._is_closed:
                raise EngineClosed
            if self._count_open() + len(jobs) > self._max_queue:
                busiest = max(self.writer, self.pixels, key=lambda worker: worker.wait_seconds)
                raise QueueFull(busiest.wait_seconds)
            self._open.update(jobs)
        for job in jobs:
            job.future.add_done_callback(partial(self._end, job))
            self.writer.put(job)

    def close(self, seconds: float = 30.0) -> None:
        """Finishes what was taken, as far as that is possible in so many seconds, and ends the threads."""
        with self._lock:
            self._is_closed = True
        until = time.monotonic() + seconds
        while self.size and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        self.writer.close()
        self.pixels.close()

    def _write(self, jobs: list[Any]) -> None:
        self._backend.write(jobs)
        for job in jobs:
            if isinstance(job, ImageJob) and job.codes is not None:
                self.pixels.put(job)
            elif not job.is_over:
                job.fail(WorkerDied("The server has left this unfinished."))

    def _count_open(self) -> int:
        return sum(not job.future.done() for job in self._open)  # whoever waits for one may be faster than its `_end`

    def _end(self, job: TextJob | ImageJob, future: Future) -> None:
        with self._lock:
            self._open.discard(job)
        if future.exception() is None:
            self.metrics.tokens.labels("prompt").inc(job.usage.prompt_tokens)
            self.metrics.tokens.labels("code" if isinstance(job, ImageJob) else "text").inc(job.usage.new_tokens)
            self.metrics.pictures.inc(isinstance(job, ImageJob))


__all__ = ["Backend", "Engine", "EngineClosed", "Metrics", "QueueFull", "Worker", "WorkerDied"]
