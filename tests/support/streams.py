"""Runs of the app in the test's own process."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields

import app
from runs import IDLE_THREADS


def stream(video: object, conf_threshold: float, **settings: object) -> Iterator[app.StreamUpdate]:
    """`app.stream_object_detection` with fields of `Options` and `Plan` by name."""
    options = {field.name: settings.pop(field.name) for field in fields(app.Options) if field.name in settings}
    if "folder" in settings:
        settings["folder"] = str(settings["folder"])
    plan = app.Plan(**settings)
    return app.stream_object_detection(str(video), conf_threshold, app.Options(**options), plan=plan)


def analysis_of(video: object, conf_threshold: float = 0.3, join_seconds: float = 0, **options: object) -> app.Analysis:
    """A run that has not begun; of every frame, unless `analysed` is given."""
    options = app.Options(**{"analysed": app.EVERY_FRAME, **options})
    return app.Analysis(str(video), conf_threshold, options, join_seconds)


def run(video: object, conf_threshold: float = 0.3, save_to: object = None, **options: object) -> app.Analysis:
    """A whole run, as the page makes it. Its files are copied to the folder `save_to`."""
    analysis = analysis_of(video, conf_threshold, **options)
    with closing(analysis.stream()) as updates:
        while not analysis.is_end:
            analysis.add(next(updates))
        if save_to:
            analysis.saved = {kind: shutil.copy(path, save_to) for kind, path in analysis.save().items()}
    return analysis


def busy_threads() -> set[threading.Thread]:
    """The threads of this process, without those of the app that wait to be used again."""
    idle = [thread for threads in list(IDLE_THREADS.values()) for thread in list(threads)]
    return set(threading.enumerate()).difference(idle)


def all_end(new_threads, seconds=3):
    deadline = time.monotonic() + seconds
    while new_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not new_threads()


def count_passes(monkeypatch, detector=app.DETECTOR):
    """A list that gets the number of frames of each forward pass, once those of the tests before have ended."""
    assert all_end(lambda: {thread for thread in busy_threads() if thread.name.startswith("prefetch")}, seconds=10)
    passes = []
    forward = detector.model.forward

    def counting(*args, **kwargs):
        passes.append(len(kwargs["pixel_values"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(detector.model, "forward", counting)
    return passes
