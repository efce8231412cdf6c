"""Many visitors at once, and visitors who leave: each gets his own result, and nothing of him stays."""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client
from streams import analysis_of, stream
from videos import Kind, ask_for_whole_video, read_chunks
from visitors import Visitor, upload

import app


def test_eight_clients_at_once_get_each_what_they_get_alone(server, tmp_path):
    """Twice as many as run at once; different videos, thresholds and sizes."""
    kinds = [
        Kind(f"visitor{n}", frames=40 + 3 * n, size=(160 + 16 * n, 96), audio=() if n % 2 else ("-c:a", "aac"))
        for n in range(8)
    ]
    jobs = [(kind.make(tmp_path), n / 20, list(app.RESOLUTIONS)[n % 2]) for n, kind in enumerate(kinds)]

    def visit(job):
        path, threshold, resolution = job
        return ask_for_whole_video(Client(server, verbose=False), path, threshold, [], resolution, "Every frame")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(visit, jobs, timeout=200))
    for (path, threshold, resolution), (annotated, found) in zip(jobs, answers, strict=True):
        report = analysis_of(path, threshold, resolution=resolution, analysed=app.EVERY_FRAME)
        for update in stream(str(path), threshold, resolution=resolution, folder=tmp_path):
            report.add(update)
        report.folder = str(tmp_path)
        assert found == json.loads(Path(report.save()["json"]).read_text())
        np.testing.assert_array_equal(read_chunks([annotated]).pictures, read_chunks(report.chunks).pictures)


def state(pid, cache):
    """What of a process can pile up: its threads, open files and memory in MB, and what lies on its disk."""
    status = Path(f"/proc/{pid}/status").read_text()
    kept = [Path(folder, name) for folder, _, names in os.walk(cache) for name in names if name != "server.log"]
    return {
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
        "memory": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
        "files": len(kept),
        "chunks": sum(file.parent.name.startswith("chunks-") for file in kept),
    }


def settles(pid, cache, wanted, seconds=8.0):
    """The state, as soon as it fits, or after some seconds."""
    deadline = time.monotonic() + seconds
    while not wanted(now := state(pid, cache)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def test_a_visitor_who_goes_frees_the_model_within_two_seconds(server_process, tmp_path):
    server, pid = server_process
    path = upload(server, Kind("left", frames=9000, audio=()).make(tmp_path))
    for endpoint in ("stream_object_detection", "detect_video"):
        visitor = Visitor(server, path, endpoint=endpoint)
        visitor.wait_for("event: generating")
        assert any(seconds_of_work(pid) > 0.2 for _ in range(20)), "nothing was running"
        visitor.leave()
        time.sleep(1.9)
        assert seconds_of_work(pid) < 0.1, endpoint


def seconds_of_work(pid, seconds=0.5):
    """How much processor time the app's threads take within half a second, those of low priority.

    Gradio's event loop polls all the time, which takes a tenth of a core, or more on a busy machine.
    """

    def niceness_and_ticks(stat):
        fields = stat.read_text().rsplit(")", 1)[1].split()
        return int(fields[16]), int(fields[11]) + int(fields[12])

    def ticks_of_work():
        _, work = niceness_and_ticks(Path(f"/proc/{pid}/stat"))
        for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # the thread has just ended
                niceness, ticks = niceness_and_ticks(stat)
                work -= ticks if niceness == 0 else 0
        return work

    before = ticks_of_work()
    time.sleep(seconds)
    return (ticks_of_work() - before) / os.sysconf("SC_CLK_TCK")


def test_after_thirty_visitors_who_went_all_is_as_after_the_fifth(server_process, cache, tmp_path):
    server, pid = server_process
    path = upload(server, Kind("thirty", frames=1200).make(tmp_path))
    for number in range(30):
        visitor = Visitor(server, path, threshold=(1 + number % 19) / 20)
        visitor.wait_for("playlist|m3u8")
        visitor.leave()
        if number == 4:
            settles(pid, cache, lambda now: now["chunks"] == 0)
            time.sleep(1)
            after_five = state(pid, cache)
    now = settles(
        pid,
        cache,
        lambda now: all(now[name] <= after_five[name] for name in ("threads", "open files", "files", "chunks")),
    )
    assert now["chunks"] == 0
    assert now["files"] <= after_five["files"]
    assert now["threads"] <= after_five["threads"] + 3  # the server's own pool
    assert now["open files"] <= after_five["open files"] + 3
    assert now["memory"] < after_five["memory"] + 40


def test_visitors_who_leave_at_the_worst_of_moments_do_not_freeze_the_app(tmp_path):
    """In a process of its own, which could not go on after a freeze."""
    script, path = Path(__file__).with_name("support") / "dropped_runs.py", Kind("dropped", frames=200).make(tmp_path)
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, script, path], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("chunks-*"))


# ------------------------------------------------------------------------------------------------- the queue


def request_of(session):
    return SimpleNamespace(session_hash=session)


def page_run(session, path):
    """What a run of one session sends to the page."""
    return app.start(str(path), 0.3, request_of(session), analysed=app.EVERY_FRAME, lines={})


def watch(session, path, lines):
    """A run of one session on the page; collects its status lines."""
    for values in page_run(session, path):
        if isinstance(status := values.get(app.status), str):
            lines.append(status)


@pytest.fixture
def video(tmp_path):
    return Kind("queued", frames=70, audio=()).make(tmp_path)


def test_a_run_that_waits_says_its_position_and_can_be_stopped(video, monkeypatch):
    monkeypatch.setattr(app.RUNS, "concurrent", 0)
    lines = []
    with ThreadPoolExecutor() as pool:
        run = pool.submit(watch, "a", video, lines)
        while not lines:
            time.sleep(0.01)
        app.stop(request_of("a"))
        run.result(timeout=2)
    assert lines[0] == "Waiting in the queue: position 1."
    assert lines[-1].startswith("Stopped: 0.0 s of video")
    assert len(app.RUNS) == 0


def test_runs_beyond_the_limit_wait_for_their_turn(video, monkeypatch):
    monkeypatch.setattr(app.RUNS, "concurrent", 1)
    lines = {session: [] for session in "abc"}
    with ThreadPoolExecutor() as pool:
        for session in lines:
            pool.submit(watch, session, video, lines[session])
            time.sleep(0.05)
    assert all(status[-1].startswith("Done: 2.3 s") for status in lines.values())
    assert "position 1" in lines["b"][0] and "position 2" in lines["c"][0]
    assert len(app.RUNS) == 0


def test_a_full_queue_gets_a_sentence(video, monkeypatch):
    monkeypatch.setattr(app.RUNS, "limit", 0)
    with pytest.raises(gr.Error) as error:
        watch("a", video, [])
    assert error.value.message == "Too many people are using this app. Try again in a few minutes."
    assert len(app.RUNS) == 0


def test_after_a_full_queue_the_page_allows_another_run():
    """The first run was refused before it sent anything, and the buttons are as on an empty page."""
    failed = {event.trigger_after for event in app.demo.fns.values() if event.fn is app.allow_another_run}
    assert failed == {event._id for event in app.demo.fns.values() if event.fn in (app.start, app.redraw)}
    values = app.allow_another_run(was_running=False)
    assert values[app.start_button]["interactive"]
    assert values[app.status] == gr.skip()


def test_a_run_sends_nothing_while_gradio_still_sends_the_last_output_of_the_one_before(video):
    """However long it takes: an old chunk after the new run's first output would stay on the page."""
    first, second, third = (page_run(session, video) for session in "aaa")
    while app.player not in next(first):
        pass
    with ThreadPoolExecutor() as pool:
        replaced = pool.submit(next, second)
        time.sleep(0.05)
        output = pool.submit(next, third)
        time.sleep(2.5)
        assert not output.done()
        assert next(first) == {app.status: gr.skip()}
        assert app.player in output.result(timeout=10)
        third.close()
        assert replaced.result(timeout=10) == {app.status: gr.skip()}
    assert len(app.RUNS) == 0


def test_of_two_runs_that_start_in_the_same_moment_the_second_one_stays(video):
    first, second = [], []
    with ThreadPoolExecutor() as pool:
        pool.submit(watch, "a", video, first)
        time.sleep(0.01)
        pool.submit(watch, "a", video, second)
    assert not first
    assert second[-1].startswith("Done")
    assert len(app.RUNS) == 0


def test_the_page_loads_within_a_second_while_forty_visitors_wait_or_watch(server, tmp_path):
    path = upload(server, Kind("forty", frames=3000, audio=()).make(tmp_path))
    visitors = [Visitor(server, path, threshold=(1 + number) / 50) for number in range(40)]
    for visitor in visitors:
        visitor.wait_for("queue|First chunk| of ")
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        urllib.request.urlopen(server, timeout=20).read()
        seconds.append(time.monotonic() - began)
    for visitor in visitors:
        visitor.leave()
    assert statistics.median(seconds) < 1


def test_a_visitor_who_leaves_does_not_delay_the_others(server, tmp_path):
    """Ending a run once waited for its threads, in the event loop."""
    path = upload(server, Kind("leaving", frames=3000, audio=()).make(tmp_path))
    slowest = []
    for number in range(5):
        visitor = Visitor(server, path, threshold=0.9 + number / 100)
        visitor.wait_for("playlist|m3u8")
        visitor.leave()
        until, seconds = time.monotonic() + 1, []
        while time.monotonic() < until:
            began = time.monotonic()
            urllib.request.urlopen(f"{server}/gradio_api/startup-events", timeout=20).read()
            seconds.append(time.monotonic() - began)
        slowest.append(max(seconds))
    assert statistics.median(slowest) < 0.2, slowest
