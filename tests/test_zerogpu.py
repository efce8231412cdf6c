"""GPUs that are lent for seconds: what is asked for, and how a run ends and goes on in another process."""

import dataclasses
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time

import gradio as gr
import numpy as np
import pytest
from test_streaming import count_passes
from videos import Kind, read_chunks, read_number

import app


@pytest.fixture
def video(tmp_path):
    """61 output frames in three chunks, with a beep each second."""
    return str(Kind("lent", frames=122).make(tmp_path))


@pytest.fixture
def on_zerogpu(monkeypatch):
    monkeypatch.setattr(app, "ON_ZEROGPU", True)
    monkeypatch.setattr(app, "GPU_PACE", app.GpuPace())


def watch(video, conf_threshold=1.0):
    """The numbers that the pictures of a run on the page show, and its sound."""
    numbers, sound = [], []
    for update in app.updates_of(app.read_video_info(video), conf_threshold, ()):
        if update and update.chunk:
            output = read_chunks([update.chunk])
            numbers += [read_number(picture) for picture in output.pictures]
            sound.append(output.audio)
    return numbers, np.concatenate(sound)


def test_what_is_asked_for_follows_the_video_and_is_capped(video, on_zerogpu):
    info = app.read_video_info(video)
    short = app.gpu_seconds(video, 0.3)
    assert app.GPU_RESERVE_SECONDS < short < 15
    hour = dataclasses.replace(info, duration_seconds=3600.0, width=1920, height=1080)
    assert app.gpu_seconds(hour, 0.3) == app.GPU_SECONDS
    assert app.gpu_seconds(hour, 0.3, start=math.floor(3599 * hour.output_fps)) < 15, "only the rest is asked for"
    assert app.gpu_seconds(hour, 0.3, budget=17) == 17


def test_the_estimate_learns_from_measured_speed(video, on_zerogpu):
    info = dataclasses.replace(app.read_video_info(video), duration_seconds=120.0)
    first = app.GPU_PACE.estimate(info, 0)
    app.GPU_PACE.learn(info, seconds=10, took=3)
    assert app.GPU_PACE.estimate(info, 0) > first + 10
    for _ in range(8):
        app.GPU_PACE.learn(info, seconds=10, took=0.1)
    assert app.GPU_PACE.estimate(info, 0) < first


def test_a_run_on_the_page_teaches_the_estimate(video, on_zerogpu):
    before = app.GPU_PACE.estimate(app.read_video_info(video), 0)
    watch(video)
    taught = app.GPU_PACE.estimate(dataclasses.replace(app.read_video_info(video), duration_seconds=60.0), 0)
    assert taught != before


def test_a_budget_that_runs_out_ends_cleanly_and_the_next_run_costs_only_the_rest(video, on_zerogpu, monkeypatch):
    warnings, passes = [], count_passes(monkeypatch)
    monkeypatch.setattr(gr, "Warning", warnings.append)
    monkeypatch.setattr(app.DETECTOR, "batch_frames", 4)
    detect = app.Detector.__call__
    monkeypatch.setattr(app.Detector, "__call__", lambda *args: time.sleep(0.2) or detect(*args))
    monkeypatch.setattr(app.GpuPace, "estimate", lambda *_: app.GPU_RESERVE_SECONDS + 1.5)
    numbers, sound = watch(video)
    assert 0 < len(numbers) < 61
    assert numbers == list(range(0, 2 * len(numbers), 2)), "all that was found is playable"
    assert len(sound) == pytest.approx(len(numbers) / 15 * 48_000, abs=2)
    assert len(warnings) == 1
    assert f"second {len(numbers) / 15:.0f}" in warnings[0]

    asked = []
    monkeypatch.setattr(app.GpuPace, "estimate", lambda self, info, start: asked.append(start) or 60)
    assert watch(video)[0] == list(range(0, 122, 2)), "the page sees the video whole, the known part without a GPU"
    assert asked == [len(numbers)]
    assert sum(passes) == 61, "no frame has gone through the model twice"


def test_what_goes_through_the_queues_can_be_pickled(video):
    info = app.read_video_info(video)
    again = pickle.loads(pickle.dumps(info))
    for update in app.stream_object_detection(again, 0.3, heartbeat=True):
        assert pickle.loads(pickle.dumps(update)) == update


def lend(arguments, results):
    """ZeroGPU's worker: a forked process, which gets its arguments and gives its results through queues."""
    for update in app.stream_object_detection(**arguments.get()):
        results.put(update)
    results.put("end")


def run_as_a_space(main, *arguments):
    """What `main`, a Space's main process, reports. Spawned, so that nothing of the tests' own process is in it."""
    spawn = multiprocessing.get_context("spawn")
    report = spawn.Queue()
    process = spawn.Process(target=main, args=(*arguments, report))
    process.start()
    reported = report.get(timeout=120)
    process.join(20)
    assert process.exitcode == 0
    return reported


def detect_in_a_thread(frames, found):
    thread = threading.Thread(target=lambda: found.put(len(app.DETECTOR(frames))))
    thread.start()
    thread.join()


def detect_in_forks(count, report):
    """How many of the forked processes could ask the model, each in a thread other than its first one."""
    app.torch.set_num_threads(1)
    frames = [np.zeros((90, 160, 3), np.uint8)] * app.DETECTOR.batch_frames
    fork = multiprocessing.get_context("fork")
    good = 0
    for _ in range(count):
        found = fork.SimpleQueue()
        worker = fork.Process(target=detect_in_a_thread, args=(frames, found))
        worker.start()
        worker.join(20)
        good += not found.empty()
    report.put(good)


def test_every_forked_worker_can_use_pytorch():
    assert run_as_a_space(detect_in_forks, 40) == 40


def space(video, report):
    """A Space's main process: its first worker is killed in mid-stream, its second one goes on."""
    app.torch.set_num_threads(1)  # a pool of threads would not survive the fork
    fork = multiprocessing.get_context("fork")
    info, numbers, start = app.read_video_info(video), [], 0
    for is_to_be_killed in (True, False):
        arguments, results = fork.Queue(), fork.Queue()
        worker = fork.Process(target=lend, args=(arguments, results))
        worker.start()
        arguments.put({"video": info, "conf_threshold": 1.0, "start": start, "budget": 60.0})
        while (update := results.get(timeout=60)) != "end":
            numbers += [read_number(picture) for picture in read_chunks([update.chunk]).pictures]
            os.remove(update.chunk)
            if is_to_be_killed:
                os.kill(worker.pid, signal.SIGKILL)
                break
        worker.join(10)
        start = len(numbers)
    report.put(numbers)


def test_a_forked_worker_is_killed_and_another_one_goes_on(video):
    assert run_as_a_space(space, video) == list(range(0, 122, 2))
