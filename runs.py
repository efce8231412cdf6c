"""Who runs when: the queue of the visitors' runs, and the background threads that stay one step ahead of them.

Gradio 6.31 drops the generator of a visitor who left without closing it. The garbage collector closes it later, at any
allocation in any thread, perhaps between two lines of a `with lock:`. So the end of a run takes no lock: it only sets
a flag, or puts into a `queue.SimpleQueue`, which is reentrant for this purpose. Others do the rest: the background
thread, which owns all that the run has opened, and whoever looks at the queue next.
"""

import atexit
import contextlib
import contextvars
import gc
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

PATIENCE_SECONDS = 5  # without a request, until the garbage collector looks for callers that are gone

T = TypeVar("T")
log = logging.getLogger("rt-detr-stream")

# ---------------------------------------------------------------------------------------------------------- queue


class BusyError(Exception):
    """The queue is full."""


class Run:
    """A session's run, from its arrival in the queue to the end of its `with` block."""

    def __init__(self, session: object):
        self.session = session
        self.is_stopped = False  # by the visitor, or by the session's next run
        self.is_replaced = False  # by the session's next run
        self.is_sending = True  # an output to Gradio, or waiting until the run before has sent its last one
        self.has_ended = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_sending, self.has_ended = False, True


class RunQueue:
    """The runs in the order of arrival, one per session: the first `concurrent` are in progress, the others wait."""

    def __init__(self, concurrent: int, limit: int):
        self.concurrent, self.limit = concurrent, limit
        self._runs: dict[object, Run] = {}
        self._lock = threading.Lock()
        self._collected = time.monotonic()

    def __len__(self) -> int:
        with self._current() as runs:
            return len(runs)

    def new_run(self, session: object) -> Run:
        """Adds a run, or replaces the session's previous one in its place, once Gradio has sent that one's last output.

        Raises:
            BusyError: If `limit` runs are there already.
        """
        run = Run(session)
        with self._current() as runs:
            previous = runs.get(session)
            if not previous and len(runs) >= self.limit:
                raise BusyError
            runs[session] = run
        if previous:
            previous.is_stopped = previous.is_replaced = True
            while previous.is_sending:
                time.sleep(0.01)
        run.is_sending = False
        return run

    def position(self, run: Run) -> int:
        """How many runs must end before this one is in progress."""
        with self._current() as runs:
            before = itertools.takewhile(lambda other: other is not run, runs.values())
            position = max(0, len(list(before)) - self.concurrent + 1)
        if position and time.monotonic() > self._collected + 2 * PATIENCE_SECONDS:
            self._collected = time.monotonic()
            gc.collect()  # those before may have been dropped, too
        return position

    def stop(self, session: object) -> None:
        """Ends the session's run. Everything that it has sent stays."""
        with self._current() as runs:
            if session in runs:
                runs[session].is_stopped = True

    @contextlib.contextmanager
    def _current(self) -> Iterator[dict[object, Run]]:
        """Locks the runs by session, without those that have ended."""
        with self._lock:
            for run in [run for run in self._runs.values() if run.has_ended]:
                del self._runs[run.session]
            yield self._runs


# ----------------------------------------------------------------------------------------------------- background


class BackgroundThread(threading.Thread):
    """Serves one `Prefetcher` after the other.

    It never ends, but waits for the next one: a thread that ends takes a lock of OpenCV's, and a process that ZeroGPU
    forks in that moment would wait for it forever.
    """

    def __init__(self, niceness: int):
        super().__init__(name="prefetch", daemon=True)
        self.niceness = niceness
        # What to do: the arguments of `_serve` to serve these; then True for the next item, False to close
        # them. None, at the exit of the process, ends this, whatever it is.
        self.inbox: SimpleQueue[tuple | bool | None] = SimpleQueue()

    def run(self) -> None:
        if sys.platform == "linux":  # elsewhere, this would be the whole process
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.setpriority(os.PRIO_PROCESS, 0, self.niceness)
        while job := self.inbox.get():
            try:
                self._serve(*job)
            except Exception:
                log.exception("a run could not be cleaned up")
            del job
            IDLE_THREADS[os.getpid(), self.niceness].append(self)

    def _serve(
        self,
        context: contextvars.Context,
        items: Generator[T],
        results: "SimpleQueue[tuple[T | None, BaseException | None]]",
        clean_up: Callable[[], object],
        patience_seconds: float | None,
    ) -> None:
        try:
            while self._is_asked(patience_seconds):
                try:
                    results.put((context.run(next, items), None))
                except BaseException as error:  # StopIteration, too
                    traceback.clear_frames(error.__traceback__)  # else files stay open as long as the error lives
                    results.put((None, error))
            results.put((None, StopIteration()))  # if the process exits, somebody may still wait for an item
            context.run(items.close)
        finally:
            clean_up()

    def _is_asked(self, patience_seconds: float | None) -> bool:
        """Waits for a request. Whether it is for another item, not to close.

        A caller that was dropped in a reference cycle stays until a full collection, which a large process rarely does.
        """
        while True:
            try:
                return bool(self.inbox.get(timeout=patience_seconds))
            except Empty:
                gc.collect()


# By process id, because a forked process has none of its parent's threads, and by niceness.
IDLE_THREADS: defaultdict[tuple[int, int], deque[BackgroundThread]] = defaultdict(deque)


@atexit.register
def end_threads() -> None:
    """Lets each thread finish its item: Python aborts the process if one returns from C++ after Python's own end."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, BackgroundThread)]
    for thread in threads:
        thread.inbox.put(None)  # ends a `Prefetcher`
        thread.inbox.put(None)  # ends the thread
    for thread in threads:
        thread.join(10)


class Prefetcher(Iterator[T]):
    """The same items. A background thread computes the next one while the caller uses the current one.

    To close or to drop it does not wait for the item in progress: the thread closes `items` after that.

    Args:
        niceness: Of the thread, on Linux.
        heartbeat_seconds: After this long without an item, None comes instead.
        clean_up: What the thread calls after it has closed `items`. Until then, all that they have made stays, even if
            they have ended.
    """

    def __init__(
        self,
        items: Generator[T],
        niceness: int = 19,
        heartbeat_seconds: float | None = None,
        clean_up: Callable[[], object] = lambda: None,
    ):
        self._heartbeat_seconds = heartbeat_seconds
        self._results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._thread: BackgroundThread | None = None
        try:
            thread = IDLE_THREADS[os.getpid(), niceness].pop()
        except IndexError:
            thread = BackgroundThread(niceness)
            thread.start()
        # The context has the visitor's request, which ZeroGPU reads.
        patience_seconds = PATIENCE_SECONDS if heartbeat_seconds else None  # who wants a heartbeat asks at once
        thread.inbox.put((contextvars.copy_context(), items, self._results, clean_up, patience_seconds))
        self._thread, self._has_begun = thread, False

    def __next__(self) -> T | None:
        if not self._thread:
            raise StopIteration
        if not self._has_begun:
            self._has_begun = True
            self._thread.inbox.put(True)
        try:
            item, error = self._results.get(timeout=self._heartbeat_seconds)
        except Empty:
            return None
        self._thread.inbox.put(True)
        try:
            if error:
                raise error
            return item
        finally:
            del error  # its traceback has this frame: a cycle, which would keep alive all frames below

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread:
            thread.inbox.put(False)

    __del__ = close
