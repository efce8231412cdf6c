"""GPUs that are lent for seconds: what a run requests, how it goes on with the next call, and when it gives them back.

support/zerogpu_space.py runs the app with the real wrapper of `spaces`, which forks workers, in a process of its own.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streams import stream

import app

ALL_NUMBERS = list(range(0, 122, 2))  # of the pictures: at half the rate, every second one is shown
SAMPLES_PER_FRAME = 48_000 // 15


@pytest.fixture(scope="module")
def happened(tmp_path_factory) -> Callable[[str], dict]:
    """What happened in one of the scenarios, by its name."""
    folder = tmp_path_factory.mktemp("space")
    (folder / "tmp").mkdir()
    script = Path(__file__).with_name("support") / "zerogpu_space.py"
    env = {**os.environ, "TMPDIR": str(folder / "tmp")}
    subprocess.run([sys.executable, script, folder], env=env, check=True, timeout=240)
    report = json.loads((folder / "report.json").read_text())

    def in_scenario(name: str) -> dict:
        assert "traceback" not in report[name], report[name]["traceback"]
        return report[name]

    return in_scenario


def assert_beginning(run: dict) -> None:
    """The run shows some of the video, from its first frame on, without a gap, and with as much sound as picture."""
    frames = len(run["numbers"])
    assert 0 < frames < len(ALL_NUMBERS)
    assert run["numbers"] == ALL_NUMBERS[:frames]
    assert run["samples"] == pytest.approx(frames * SAMPLES_PER_FRAME, abs=2)


def assert_whole(run: dict) -> None:
    assert run["error"] is None
    assert run["is_end"]
    assert run["numbers"] == ALL_NUMBERS
    assert run["samples"] == pytest.approx(len(ALL_NUMBERS) * SAMPLES_PER_FRAME, abs=2)


def test_a_run_shows_every_frame_and_gives_its_gpu_back_once(happened):
    run = happened("whole_run")
    assert_whole(run)
    assert len(run["requests"]) == len(run["releases"]) == 1
    assert run["overrun"] == 0
    assert run["left"] == []


def test_the_platform_learns_which_visitor_a_gpu_is_for(happened):
    assert happened("whole_run")["visitors"] == ["a visitor's request"]


@pytest.mark.parametrize("scenario", ["budget_that_ends", "budget_that_ends_and_another_gpu"])
def test_a_run_goes_on_with_the_next_gpu_call(happened, scenario):
    run = happened(scenario)
    assert_whole(run)
    assert len(run["requests"]) >= 2
    assert len(run["releases"]) == len(run["requests"])
    assert not any(failed for _, failed in run["releases"])


def test_a_later_call_requests_only_the_rest(happened):
    requests = happened("budget_that_ends")["requests"]
    assert requests == sorted(set(requests), reverse=True)


def test_a_second_run_with_another_threshold_needs_no_gpu(happened):
    run = happened("budget_that_ends")
    assert_whole(run["again"])
    assert run["requests_of_again"] == 0


def test_a_refused_call_ends_the_run_with_the_reason_and_what_there_is(happened):
    run = happened("refused_second_call")
    assert_beginning(run)
    assert run["error"][0] == "ZeroGPU quota exceeded"
    assert "Try again in 3:04:05" in run["error"][1]
    assert len(run["releases"]) == 1


def test_a_run_takes_what_is_left_of_the_quota_if_a_chunk_fits_in(happened):
    run = happened("short_quota")
    assert_whole(run)
    assert run["requests"] == [12]
    assert run["without_a_chunk"]["error"][0] == "ZeroGPU quota exceeded"


def test_the_time_that_a_worker_takes_to_begin_counts(happened):
    run = happened("slow_start")
    assert_whole(run)
    assert run["overrun"] == 0
    assert len(run["requests"]) >= 2


def test_a_worker_gets_only_the_rest_of_what_is_cached_and_does_not_read_the_packets(happened):
    run = happened("what_a_worker_gets")
    assert run["all_have_info"]
    assert run["calls"][0] == [0, None]
    assert len(run["calls"]) >= 2
    for start, first in run["calls"][1:]:
        assert first is None or first >= 2 * start - 2


def test_a_killed_worker_ends_the_run_with_an_error_and_what_there_is(happened):
    run = happened("killed_worker")
    assert_beginning(run)
    assert run["error"] == ["ZeroGPU worker error", "GPU task aborted"]
    assert [failed for _, failed in run["releases"]] == [True]
    assert run["left"] == []


def test_the_next_run_gets_another_worker_after_one_was_killed(happened):
    assert_whole(happened("killed_worker")["next"])


def test_a_visitor_who_leaves_gives_the_gpu_back(happened):
    run = happened("visitor_who_leaves")
    assert run["seconds_to_close"] < 0.1, "the event loop has other visitors"
    assert run["seconds_to_release"] < 20, "the rest of the video takes twice as long"
    assert run["releases"][0][1] is False
    assert run["left"] == []


def test_the_next_visitor_gets_the_worker_of_one_who_left(happened):
    assert_whole(happened("visitor_who_leaves")["next"])


def test_a_visitor_who_waits_for_a_gpu_is_told_so(happened):
    run = happened("visitor_who_leaves_while_waiting")
    assert run["heartbeats"] >= 2
    assert run["said_so"]


def test_a_gpu_that_comes_too_late_is_given_back_at_once(happened):
    run = happened("visitor_who_leaves_while_waiting")
    assert run["granted_before"] == 0
    assert run["seconds_to_close"] < 0.5
    assert len(run["requests"]) == len(run["releases"]) == 1
    assert run["seconds_to_release"] < 10
    assert run["left"] == []


def test_a_damaged_file_is_known_in_the_main_process(happened):
    run = happened("damaged_file")
    assert_beginning(run)
    assert run["is_end"]
    assert run["is_damaged"]


def test_visitors_at_the_same_time_have_a_worker_each(happened):
    run = happened("visitors_at_once")
    assert run["runs"] == [ALL_NUMBERS] * 3
    assert len({token for token, _ in run["releases"]}) == 3


def test_every_forked_worker_can_use_pytorch_in_a_thread(happened):
    run = happened("forks")
    assert run["frames"] == [4] * 10
    assert len({token for token, _ in run["releases"]}) == 10


def test_a_worker_uses_the_chosen_model(happened):
    run = happened("another_model")
    assert run["scores"] == [0.75] * 4
    assert len(run["requests"]) == 1


def test_a_request_is_for_the_rest_at_the_pace_of_the_call_before(happened):
    (first, assumed), (rest, measured), *_ = happened("budget_that_ends")["paces"]
    assert (first, assumed) == (61, app.GPU_SECONDS_PER_FRAME)
    assert 0 < rest < 61
    assert measured > 0.05, "a pass of four frames took 0.2 s"


def test_a_slow_page_does_not_look_like_a_slow_gpu(happened):
    run = happened("slow_page")
    (first, _), (rest, measured), *_ = run["paces"]
    assert measured * (first - rest) < run["paused_seconds"]


def test_a_request_follows_the_length_and_is_capped(happened):
    assert happened("whole_run")["requests"] == [app.gpu_budget_seconds(61, app.GPU_SECONDS_PER_FRAME)]
    assert app.GPU_RESERVE_SECONDS < app.gpu_budget_seconds(1, 0.02) < app.gpu_budget_seconds(300, 0.02) < 60
    assert app.gpu_budget_seconds(1_000_000, 0.02) == app.GPU_SECONDS


def test_an_update_can_be_pickled(tmp_path):
    video = app.EXAMPLES / "bouncing-shapes.mp4"
    update = next(stream(str(video), 0.3, folder=str(tmp_path)))
    again = pickle.loads(pickle.dumps(update))
    without = {"frames": [], "tracker": None, "counter": None}
    assert again._replace(**without) == update._replace(**without)
    assert len(again.frames) > 0
    for frame, frame_again in zip(update.frames, again.frames, strict=True):
        assert frame_again[:3] == frame[:3]
        for name in ("xyxy", "confidence", "class_id", "tracker_id"):
            assert np.array_equal(getattr(frame_again.drawn, name), getattr(frame.drawn, name))
