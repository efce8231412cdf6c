"""Visitors who leave at the worst of moments: `python dropped_runs.py VIDEO` shows all stacks if the app freezes.

Gradio 6.31 drops the generator of a visitor who has left, but a reference cycle keeps it until the garbage collector
closes it, at any allocation in any thread. Here, that is right after any thread has taken any lock.
"""

import faulthandler
import gc
import os
import random
import sys
import threading
from _thread import allocate_lock
from pathlib import Path
from types import SimpleNamespace

dropped: list[object] = []


class Lock:
    """A lock that lets the garbage collector close what visitors have dropped, while it is held."""

    def __init__(self):
        self._lock = allocate_lock()

    def acquire(self, *args: object, **kwargs: object) -> bool:
        is_acquired = self._lock.acquire(*args, **kwargs)
        if is_acquired and dropped and random.random() < 0.2:  # else it would never be an inner lock
            dropped.clear()
            gc.collect()
        return is_acquired

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> object:
        return getattr(self._lock, name)


threading.Lock = Lock  # before the imports: they make locks for the whole process

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MODEL_ID", str(ROOT / "examples/shapes-rtdetr"))

from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from queue import Queue  # noqa: E402

import app  # noqa: E402


def take_locks() -> None:
    """What the threads of a server do all the time."""
    pool, queue = ThreadPoolExecutor(1), Queue()
    while not is_over.is_set():
        pool.submit(queue.put, "answer")  # with a lock that all pools of the process share, even asyncio's
        queue.get()
        with app.new_run(object()):
            pass


def visit(session: int) -> None:
    """Watches a video until the first chunk, or only until the first status, and leaves."""
    request = SimpleNamespace(session_hash=session)
    run = app.start(sys.argv[1], 0.3, request, analysed=app.EVERY_FRAME, lines={})
    while (app.player if session % 3 else app.status) not in next(run):
        pass
    cycle = [run]
    cycle.append(cycle)
    dropped.append(cycle)


faulthandler.dump_traceback_later(120, exit=True)
app.SETTLE_SECONDS = 0
gc.disable()
gc.freeze()  # what is there already, so that collections are quick
is_over = threading.Event()
for _ in range(3):
    threading.Thread(target=take_locks, daemon=True).start()
for session in range(60):
    visit(session)
is_over.set()
