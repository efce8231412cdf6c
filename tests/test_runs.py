"""The queue of runs, and the background threads that stay one step ahead."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing

import pytest
from conftest import ROOT
from streams import all_end

import runs
from runs import BusyError, Prefetcher, RunQueue

# ---------------------------------------------------------------------------------------------------------- queue


def test_in_a_full_queue_a_session_may_replace_its_own_run():
    queue = RunQueue(concurrent=1, limit=1)
    with queue.new_run("a") as replaced:
        with pytest.raises(BusyError), queue.new_run("b"):
            pass
        with queue.new_run("a") as run:
            assert replaced.is_stopped and replaced.is_replaced
            assert not run.is_stopped and not run.is_replaced
            assert len(queue) == 1
    assert len(queue) == 0


def test_a_session_keeps_its_place_in_the_queue():
    queue = RunQueue(concurrent=1, limit=9)
    with queue.new_run("a"), queue.new_run("b") as other:
        with queue.new_run("a") as run:
            assert [queue.position(each) for each in (run, other)] == [0, 1]
        assert queue.position(other) == 0
    assert len(queue) == 0


def test_stop_ends_the_run_of_one_session():
    queue = RunQueue(concurrent=9, limit=9)
    with queue.new_run("a") as run, queue.new_run("b") as other:
        queue.stop("a")
        queue.stop("a session without a run")
        assert run.is_stopped and not run.is_replaced
        assert not other.is_stopped


# ------------------------------------------------------------------------------------------------------ background


class SlowSteps:
    """A generator whose items take `seconds` each, and which notes its progress in `log`."""

    def __init__(self, seconds):
        self.log, self.is_closed = [], threading.Event()
        self.items = self._generate(seconds)

    def _generate(self, seconds):
        try:
            for number in range(5):
                self.log.append(f"begins {number}")
                time.sleep(seconds)
                self.log.append(f"ends {number}")
                yield number
        finally:
            self.log.append("closed")
            self.is_closed.set()


def test_prefetching_keeps_the_items_and_makes_the_next_one_meanwhile():
    steps = SlowSteps(0.1)
    began = time.monotonic()
    for expected, number in enumerate(Prefetcher(steps.items)):
        assert number == expected
        time.sleep(0.1)
    assert time.monotonic() - began < 0.8, "one after the other, this takes a second"
    assert steps.is_closed.wait(1)


def test_prefetching_is_one_item_ahead_but_no_more():
    steps = SlowSteps(0)
    with closing(Prefetcher(steps.items)) as items:
        assert next(items) == 0
        time.sleep(0.1)
        assert steps.log == ["begins 0", "ends 0", "begins 1", "ends 1"]


def test_closing_does_not_wait_for_the_step_at_hand_after_which_the_items_are_closed(new_threads):
    steps = SlowSteps(0.5)
    items = Prefetcher(Prefetcher(steps.items))
    assert next(items) == 0
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 0.25
    assert not steps.is_closed.is_set()
    assert steps.is_closed.wait(2)
    assert steps.log[-2:] in (["ends 1", "closed"], ["ends 2", "closed"])
    assert all_end(new_threads)


def test_the_threads_do_not_end_but_are_used_again(new_threads):
    """One that ends can hang a process that is forked in the same moment."""

    def threads():
        yield threading.current_thread()
        yield threading.current_thread()

    first, second = Prefetcher(threads())
    assert all_end(new_threads)
    third, fourth = Prefetcher(threads())
    assert first is second is third is fourth
    assert first.is_alive()


def test_an_error_while_prefetching_comes_in_its_place():
    def failing():
        yield 1
        raise ValueError("broken")

    items = Prefetcher(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_one_that_is_dropped_in_a_cycle_is_closed_by_its_own_thread(new_threads):
    closed_by = []

    def items():
        try:
            yield from range(9)
        finally:
            closed_by.append(threading.current_thread())

    cycle = [Prefetcher(items())]
    cycle.append(cycle)
    thread = cycle[0]._thread
    assert next(cycle[0]) == 0
    del cycle
    gc.collect()
    assert all_end(new_threads)
    assert closed_by == [thread] != [threading.current_thread()]


def test_a_caller_that_is_dropped_in_a_cycle_is_noticed_without_a_collection_by_python(monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE_SECONDS", 0.2)
    closed = threading.Event()
    cycle = [Prefetcher(iter_once(), heartbeat_seconds=0.1, clean_up=closed.set)]
    cycle.append(cycle)
    gc.disable()
    try:
        next(cycle[0])
        del cycle
        assert closed.wait(5)
    finally:
        gc.enable()


def test_who_waits_does_not_wait_for_a_dropped_run(monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE_SECONDS", 0.1)
    queue = RunQueue(concurrent=1, limit=2)

    def run_of_a_visitor():
        with queue.new_run("gone"):
            yield

    cycle = [run_of_a_visitor()]
    cycle.append(cycle)
    gc.disable()
    try:
        next(cycle[0])
        del cycle
        with queue.new_run("waiting") as run:
            deadline = time.monotonic() + 5
            while queue.position(run) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert queue.position(run) == 0
    finally:
        gc.enable()


def test_what_items_have_made_stays_until_the_end_is_closed():
    cleaned_up = threading.Event()
    items = Prefetcher(iter_once(), clean_up=cleaned_up.set)
    assert list(items) == [0]
    assert list(items) == []
    assert not cleaned_up.wait(0.1)
    items.close()
    items.close()
    assert cleaned_up.wait(2)
    assert list(items) == []


def iter_once():
    yield 0


def test_nothing_is_computed_before_the_first_item_is_wanted(new_threads):
    steps = SlowSteps(0)
    with closing(Prefetcher(steps.items)):
        time.sleep(0.1)
        assert not steps.log
    assert all_end(new_threads)


def test_a_thread_keeps_nothing_of_a_run_that_has_ended(new_threads):
    class Frame:
        pass

    frames = []

    def items():
        while True:
            frame = Frame()
            frames.append(weakref.ref(frame))
            yield frame

    with closing(Prefetcher(items())) as prefetcher:
        next(prefetcher)
    del prefetcher
    assert all_end(new_threads)
    assert not any(frame() for frame in frames)


def test_the_thread_closes_what_a_failed_run_has_opened():
    closed_by = []

    def file():
        try:
            yield
        finally:
            closed_by.append(threading.current_thread())

    def items():
        opened = file()
        yield next(opened)
        raise ValueError("broken")

    with closing(Prefetcher(items())) as prefetcher:
        next(prefetcher)
        with pytest.raises(ValueError, match="broken") as error:
            next(prefetcher)
        assert closed_by == [prefetcher._thread]
    assert error.value


def test_a_process_that_exits_lets_the_threads_finish_their_item_and_clean_up():
    script = """
import torch
from runs import Prefetcher

def items():
    layer, pixels = torch.nn.Conv2d(3, 64, 7), torch.zeros(4, 3, 512, 512)
    while True:
        yield layer(pixels)

chunks = Prefetcher(Prefetcher(items()), clean_up=lambda: print("cleaned up"))
next(chunks)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "cleaned up\n", "")
