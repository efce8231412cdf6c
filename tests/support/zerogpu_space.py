"""A Space on ZeroGPU, on a machine without a GPU: `python zerogpu_space.py FOLDER` writes FOLDER/report.json.

The app runs as it would there, with the real `spaces` package: its wrapper forks workers and carries the updates
from them. Only what needs CUDA and the platform's device API are replaced. Each function under "scenarios" is one
entry of the report, which test_zerogpu.py checks.
"""

# ruff: noqa: E402

import contextlib
import copy
import functools
import glob
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT, FOLDER = Path(__file__).parents[2], Path(sys.argv[1])
sys.path.insert(0, str(ROOT))
os.environ |= {
    "SPACES_ZERO_GPU": "true",
    "SPACES_ZERO_DEVICE_API_URL": "http://device-api.invalid",
    "CUDA_VISIBLE_DEVICES": "",
}

import torch


def do_nothing(*_: object, **__: object) -> int:
    return 0


torch.version.cuda = "12.8"  # `spaces` refuses to start with a PyTorch that was built for CPUs
torch._C._cuda_init = torch.cuda._is_in_bad_fork = do_nothing

import spaces.zero.torch
import spaces.zero.wrappers

spaces.zero.torch.unpatch()  # the app is to choose the CPU
for module in (spaces.zero.torch, spaces.zero.wrappers.torch):
    module.unpatch = module.init = module.size = module.move = module.enter_mode = do_nothing

import cv2
import numpy as np
from gradio.context import LocalContext
from streams import analysis_of
from videos import Kind, read_chunks, read_number

import app

torch.set_num_threads(1)  # a pool of threads would not survive the fork; with a GPU there is none
cv2.setNumThreads(4)  # as on a machine with more cores

GPU_INDICES = iter(range(1_000_000))


class Platform:
    """What lends the GPUs, and a record of it. Each platform has GPUs of its own, so it begins with new workers."""

    def __init__(self):
        self.requests: list[float] = []  # seconds
        self.visitors: list[object] = []  # who asked, as far as the wrapper knows
        self.releases: list[tuple[str, bool]] = []  # whose, and whether the worker failed
        self.overrun = 0  # how many calls took longer than requested
        self.waiting_seconds = 0.0  # until a GPU is granted
        self.refuses_after = 1_000  # calls
        self.left_seconds = math.inf  # of the visitor's quota
        self.has_always_new_gpus = False
        self._free: list[int] = []
        self._lock = threading.Lock()
        spaces.zero.client.schedule, spaces.zero.client.release = self.schedule, self.release
        spaces.zero.client.allow, spaces.zero.client.duration_warning = do_nothing, self.warn

    def schedule(self, *, request: object, duration: object, **_: object) -> SimpleNamespace:
        if len(self.requests) >= self.refuses_after:
            message = "You have exceeded your free ZeroGPU quota (60s requested vs. 12s left). Try again in 3:04:05. "
            raise spaces.zero.gradio.error("ZeroGPU quota exceeded", message)
        if duration.total_seconds() > self.left_seconds:
            requested = f"{duration.total_seconds():.0f}s requested vs. {self.left_seconds}s left"
            raise spaces.zero.gradio.error("ZeroGPU quota exceeded", f"You have exceeded your quota ({requested}). ")
        time.sleep(self.waiting_seconds)
        with self._lock:
            self.requests.append(duration.total_seconds())
            self.visitors.append(request)
            gpu = self._free.pop() if self._free and not self.has_always_new_gpus else next(GPU_INDICES)
        return SimpleNamespace(allowToken=str(gpu), nvidiaIndex=gpu, nvidiaUUID=f"GPU-{gpu}", idle=True)

    def release(self, token: str, *, fail: bool = False, allow_404: bool = False) -> None:
        with self._lock:
            self.releases.append((token, fail))
            self._free.append(int(token))

    def warn(self) -> None:
        self.overrun += 1


@contextlib.contextmanager
def patched(target: object, **values: object):
    old = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(target, name, value)


def slow_gpu(seconds: float):
    """A model that takes `seconds` for a pass of four frames, in the workers that are forked meanwhile."""
    detect = app.Detector.__call__
    return patched(app.Detector, __call__=lambda *args: time.sleep(seconds) or detect(*args))


@contextlib.contextmanager
def short_budgets():
    """Calls that are over before the video is."""
    with patched(app, GPU_RESERVE_SECONDS=0.3, gpu_budget_seconds=lambda frames, _: 1.5 + frames / 100):
        yield


@contextlib.contextmanager
def requests_seen():
    """The output frames of each request meanwhile, and the seconds per frame that it assumes."""
    seen, budget = [], app.gpu_budget_seconds
    with patched(app, gpu_budget_seconds=lambda *request: seen.append(request) or budget(*request)):
        yield seen


def watch(report: app.Analysis, after_each=do_nothing) -> dict:
    """A run from its beginning to its end: what the chunks show, and what went wrong."""
    numbers, samples, error = [], 0, None
    with contextlib.closing(report.stream()) as updates:
        try:
            while not report.is_end:
                update = next(updates)
                if report.add(update):
                    output = read_chunks([update.chunk])
                    numbers += [read_number(picture) for picture in output.pictures]
                    samples += len(output.audio)
                    after_each(update)
        except app.gr.Error as failure:
            error = failure
    seconds_until(lambda: not os.path.exists(report.folder))  # the background thread removes it
    return {
        "numbers": numbers,
        "samples": samples,
        "frames": report.output_frames,
        "is_end": report.is_end,
        "error": error and [error.title, error.message],
    }


def record(platform: Platform) -> dict:
    return {"requests": [*platform.requests], "releases": [*platform.releases], "overrun": platform.overrun}


def temporary_files() -> list[str]:
    # Unlike `Path.rglob`, it goes on if a folder is removed meanwhile.
    return glob.glob(f"{os.environ['TMPDIR']}/**/chunk*", recursive=True)


def seconds_until(condition, limit: float = 15) -> float:
    began = time.monotonic()
    while not condition() and time.monotonic() < began + limit:
        time.sleep(0.01)
    return time.monotonic() - began


# ------------------------------------------------------------------------------------------------------ scenarios


def whole_run(video: str, platform: Platform) -> dict:
    LocalContext.request.set("a visitor's request")
    with requests_seen() as paces:
        run = watch(analysis_of(video, 1.0))
    LocalContext.request.set(None)
    return run | record(platform) | {"visitors": platform.visitors, "paces": paces, "left": temporary_files()}


def budget_that_ends(video: str, platform: Platform) -> dict:
    with short_budgets(), slow_gpu(0.2), requests_seen() as paces:
        run = watch(analysis_of(video, 1.0)) | {"paces": paces}
        requests = len(platform.requests)
        again = watch(analysis_of(video, conf_threshold=0.99))
    return run | record(platform) | {"again": again, "requests_of_again": len(platform.requests) - requests}


def budget_that_ends_and_another_gpu(video: str, platform: Platform) -> dict:
    platform.has_always_new_gpus = True
    with short_budgets(), slow_gpu(0.2):
        return watch(analysis_of(video, 1.0)) | record(platform)


def slow_page(video: str, platform: Platform) -> dict:
    platform.refuses_after, pauses = 1, iter([3])
    with short_budgets(), slow_gpu(0.2), requests_seen() as paces:
        watch(analysis_of(video, 1.0), after_each=lambda _: time.sleep(next(pauses, 0)))
    return {"paces": paces, "paused_seconds": 3}


def refused_second_call(video: str, platform: Platform) -> dict:
    platform.refuses_after = 1
    with short_budgets(), slow_gpu(0.2):
        return watch(analysis_of(video, 1.0)) | record(platform)


def short_quota(video: str, platform: Platform) -> dict:
    with patched(app, gpu_budget_seconds=lambda frames, _: 20 if frames > 30 else 5):
        platform.left_seconds = 12
        run = watch(analysis_of(video, 1.0)) | record(platform)
        app.cached_video.cache_clear()
        platform.left_seconds = 4
        return run | {"without_a_chunk": watch(analysis_of(video, 1.0))}


def slow_start(video: str, platform: Platform) -> dict:
    """The worker takes half of the time to begin."""
    start = spaces.zero.wrappers.worker_init
    late = patched(spaces.zero.wrappers, worker_init=lambda **args: time.sleep(2.5) or start(**args))
    with late, slow_gpu(0.2), patched(app, GPU_RESERVE_SECONDS=1.5, gpu_budget_seconds=lambda *_: 5):
        return watch(analysis_of(video, 1.0)) | record(platform)


def what_a_worker_gets(video: str, platform: Platform) -> dict:
    plans, detect = [], app.stream_object_detection

    @functools.wraps(detect)
    def recording(*args: object, plan: app.Plan) -> object:
        plans.append((plan.after.output_frames if plan.after else 0, min(plan.cached, default=None), plan.info))
        return detect(*args, plan=plan)

    with short_budgets(), slow_gpu(0.2), patched(app, stream_object_detection=recording):
        report = analysis_of(video, 1.0)
        watch(report)
    return {"calls": [(start, first) for start, first, _ in plans], "all_have_info": all(plan[2] for plan in plans)}


def killed_worker(video: str, platform: Platform) -> dict:
    def kill_worker(update: app.StreamUpdate) -> None:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)

    with slow_gpu(0.2):
        run = watch(analysis_of(video, 1.0), after_each=kill_worker) | record(platform)
    return run | {"next": watch(analysis_of(video, 1.0)), "left": temporary_files()}


def visitor_who_leaves(video: str, platform: Platform) -> dict:
    long_video = str(Kind("long", frames=3000).make(FOLDER))

    def leave_after_a_chunk() -> float:
        updates = analysis_of(long_video, 1.0).stream()
        while not isinstance(next(updates), app.StreamUpdate):
            pass
        began = time.monotonic()
        updates.close()
        return time.monotonic() - began

    with slow_gpu(0.1):
        seconds_to_close = leave_after_a_chunk()
        seconds_to_release = seconds_until(lambda: platform.releases)
        seconds_until(lambda: not temporary_files())
    found = {"seconds_to_close": seconds_to_close, "seconds_to_release": seconds_to_release}
    return found | record(platform) | {"left": temporary_files(), "next": watch(analysis_of(video, 1.0))}


def visitor_who_leaves_while_waiting(video: str, platform: Platform) -> dict:
    platform.waiting_seconds = 2.5

    def leave_after_a_second() -> tuple[int, bool, float]:
        report, heartbeats, said_so, began = analysis_of(video, 1.0), 0, False, time.monotonic()
        updates = report.stream()
        for update in updates:
            report.add(update)
            heartbeats += update is None
            said_so = said_so or "Waiting for a GPU" in app.describe(report)
            if time.monotonic() > began + 1.4:
                break
        began = time.monotonic()
        updates.close()
        return heartbeats, said_so, time.monotonic() - began

    with slow_gpu(0.03):
        heartbeats, said_so, seconds_to_close = leave_after_a_second()
        granted_before = len(platform.requests)
        seconds_until(lambda: platform.requests)
        seconds_to_release = seconds_until(lambda: platform.releases)
        seconds_until(lambda: not temporary_files())
    return record(platform) | {
        "heartbeats": heartbeats,
        "said_so": said_so,
        "seconds_to_close": seconds_to_close,
        "granted_before": granted_before,
        "seconds_to_release": seconds_to_release,
        "left": temporary_files(),
    }


def damaged_file(video: str, platform: Platform) -> dict:
    cut_off = Path(video).with_name("cut-off.mp4")
    content = Path(video).read_bytes()
    cut_off.write_bytes(content[: len(content) * 6 // 10])
    report = analysis_of(cut_off, 1.0)
    return watch(report) | {"is_damaged": report.is_damaged}


def visitors_at_once(video: str, platform: Platform) -> dict:
    def visit(delay: float) -> list[int]:
        time.sleep(delay)
        return watch(analysis_of(video, 1.0))["numbers"]

    with slow_gpu(0.05), ThreadPoolExecutor() as pool:
        return {"runs": list(pool.map(visit, (0, 0.05, 0.5)))} | record(platform)


def forks(video: str, platform: Platform) -> dict:
    """The wrapper runs each call in a thread that is not the worker's first one."""
    platform.has_always_new_gpus = True
    frames = []
    for _ in range(10):
        app.cached_video.cache_clear()
        frames.append(watch(analysis_of(video, 1.0))["frames"])
    return {"frames": frames} | record(platform)


def another_model(video: str, platform: Platform) -> dict:
    """It always finds the same thing."""
    found = app.Detections(np.float32([[0.1, 0.1, 0.6, 0.6]]), np.float32([0.75]), np.array([3]))
    app.DETECTORS["other"] = detector = copy.copy(app.DETECTOR)
    detector._forward_pass = lambda frames: [found] * len(frames)
    report = analysis_of(video, 0.3, model="other")
    return watch(report) | {"scores": report.results.detections()["score"].tolist()} | record(platform)


def main() -> None:
    assert app.ON_ZEROGPU and app.DEVICE.type == "cpu"
    app.DETECTOR.batch_frames, app.DETECTOR.passes_at_once = 4, 1  # as on a GPU
    video = str(Kind("lent", frames=122, muxer=("-movflags", "+faststart")).make(FOLDER))  # 61 frames, three chunks
    short = str(Kind("short", frames=8, size=(640, 384)).make(FOLDER))
    scenarios = [
        (whole_run, video),
        (budget_that_ends, video),
        (budget_that_ends_and_another_gpu, video),
        (slow_page, video),
        (refused_second_call, video),
        (short_quota, video),
        (slow_start, video),
        (what_a_worker_gets, video),
        (killed_worker, video),
        (visitor_who_leaves, video),
        (visitor_who_leaves_while_waiting, video),
        (damaged_file, video),
        (visitors_at_once, video),
        (forks, short),
        (another_model, short),
    ]
    report = {}
    for scenario, path in scenarios:
        began = time.monotonic()
        app.cached_video.cache_clear()
        try:
            report[scenario.__name__] = scenario(path, Platform())
        except Exception:
            report[scenario.__name__] = {"traceback": traceback.format_exc()}
        report[scenario.__name__]["took"] = round(time.monotonic() - began, 2)
        for worker in multiprocessing.active_children():
            worker.kill()
        seconds_until(lambda: not multiprocessing.active_children())
    (FOLDER / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
