"""Objects keep their numbers, and as many are counted as there are. Tuned on seeds 100 to 111, tested on others."""

import pickle
from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest
import scenes
import shapes

import app
import tracking
from tracking import Detections

SEEDS = (7, 8)
THRESHOLD = 0.30
BATCH = 16  # frames that are numbered together


@pytest.fixture(scope="module")
def videos() -> list[tuple[list[scenes.SceneFrame], list[Detections]]]:
    """The rendered frames, and the detections that are shown on them."""
    return [scenes.render_and_detect(app.DETECTOR, kind, seed) for kind in scenes.KINDS for seed in SEEDS]


@pytest.fixture(scope="module")
def sightings(videos) -> list[tuple[Counter, list[tuple[int, int]], Counter]]:
    """For each video: sightings by class and number, true object and number of each that is right, and of the truth."""
    results = []
    for frames, found in videos:
        shown = [detections[detections.confidence > THRESHOLD] for detections in found]
        tracker, is_cut = tracking.ObjectTracker(scenes.FPS), tracking.CutFinder()
        cuts, numbers = [is_cut(frame.image) for frame in frames], []
        for start in range(0, len(frames), BATCH):
            objects = tracker.update(shown[start : start + BATCH], cuts[start : start + BATCH])
            numbers += [found.tracker_id for found in objects]
        counted, right, truth = Counter(), [], Counter()
        for frame, detections, number in zip(frames, shown, numbers, strict=True):
            counted.update(zip(detections.class_id, number, strict=True))
            truth.update(frame.truth.tracker_id)
            right += [(frame.truth.tracker_id[j], number[i]) for i, j in scenes.match(detections, frame.truth)]
        results.append((counted, right, truth))
    return results


def test_an_object_keeps_its_number(sightings):
    kept = total = 0
    for _, right, _ in sightings:
        numbers_of = defaultdict(Counter)
        for true_object, number in right:
            numbers_of[true_object][number] += 1
        kept += sum(max((n for number, n in counts.items() if number), default=0) for counts in numbers_of.values())
        total += len(right)
    assert total > 3000
    assert kept / total >= 0.92


def test_as_many_objects_are_believed_as_there_are(sightings):
    believed = true = 0
    for counted, _, truth in sightings:
        seconds = [n / scenes.FPS for (_, number), n in counted.items() if number]
        believed += sum(duration >= app.BELIEVED_SECONDS for duration in seconds)
        true += sum(n / scenes.FPS >= app.BELIEVED_SECONDS for n in truth.values())
    assert abs(believed / true - 1) <= 0.15


def test_cuts_are_found_and_motion_is_none(videos):
    for frames, _ in videos:
        is_cut = tracking.CutFinder()
        assert [is_cut(frame.image) for frame in frames] == [
            frame.shot > before.shot for before, frame in zip(frames[:1] + frames, frames, strict=False)
        ]


@pytest.mark.parametrize("fps", [12.5, 60])
def test_a_fast_pan_is_not_a_cut(fps):
    rng = np.random.default_rng(3)
    for _ in range(10):
        wide = cv2.resize(shapes.background(rng, 96, 18), (1440, 270), interpolation=cv2.INTER_LINEAR)
        is_cut = tracking.CutFinder()
        for time in np.arange(0, 2, 1 / fps):
            left = round(720 * min(1, time**2 / 2))  # a camera does not start at once
            assert not is_cut(wide[:, left : left + 480])


NOTHING = Detections.empty()


def one(x: float, y: float = 0.4, width: float = 0.1, class_id: int = 0) -> Detections:
    """A frame with a single detection."""
    box = np.array([[x, y, x + width, y + 0.2]], np.float32)
    return Detections(box, np.array([0.9], np.float32), np.array([class_id]))


def on_the_way(count: int, start: float = 0.1, class_id: int = 0) -> list[Detections]:
    return [one(start + 0.01 * index, class_id=class_id) for index in range(count)]


def numbers_on(frames: list[Detections], cut: int | None = None, fps: float = 12) -> list[list[int]]:
    tracker = tracking.ObjectTracker(fps)
    tracked = tracker.update(frames, [index == cut for index in range(len(frames))])
    return [detections.tracker_id.tolist() for detections in tracked]


def test_each_class_counts_from_one():
    frames = [Detections.merge(pair) for pair in zip(on_the_way(6), on_the_way(6, class_id=3), strict=True)]
    assert numbers_on(frames) == [[1, 1]] * 6


def test_a_second_object_of_a_class_is_number_two():
    frames = [Detections.merge(pair) for pair in zip(on_the_way(6), on_the_way(6, start=0.7), strict=True)]
    assert numbers_on(frames)[0] in ([1, 2], [2, 1])
    assert numbers_on(frames)[1:] == numbers_on(frames)[:-1]


@pytest.mark.parametrize("fps", [2, 12, 60])
def test_a_number_outlasts_a_gap_of_a_second(fps):
    seen, away = [one(0.4)] * (2 * round(fps)), [NOTHING] * round(fps)
    numbers = [[1]] * len(seen)
    assert numbers_on([*seen, *away, *seen], fps=fps) == [*numbers, *[[]] * len(away), *numbers]


def test_an_object_may_leave_and_come_back_at_another_height():
    widths = [0.1 - 0.015 * index for index in range(6)]
    out = [one(0, width=width) for width in widths]
    back = [one(0, y=0.52, width=width) for width in reversed(widths)]
    assert numbers_on([*out, *[NOTHING] * 5, *back]) == [[1]] * 6 + [[]] * 5 + [[1]] * 6


def test_after_a_cut_an_object_is_another_one():
    assert numbers_on(on_the_way(12), cut=6) == [[1]] * 6 + [[2]] * 6


def test_what_flickers_has_no_number():
    frames = on_the_way(12)
    frames[5] = Detections.merge((frames[5], one(0.7)))
    assert numbers_on(frames)[5] == [1, 0]


def test_a_tracker_that_was_pickled_goes_on():
    tracker = tracking.ObjectTracker(12)
    tracker.update(on_the_way(6), [False] * 6)
    copy = pickle.loads(pickle.dumps(tracker))
    assert copy.update(on_the_way(1, start=0.16), [False])[0].tracker_id.tolist() == [1]


def test_the_tracker_does_not_grow_with_the_video():
    tracker, rng = tracking.ObjectTracker(12), np.random.default_rng(4)
    sizes = []
    for _ in range(40):  # 40 objects come and go, 48 frames each
        frames = on_the_way(24, start=rng.uniform(0, 0.6)) + [NOTHING] * 24
        tracker.update(frames, [False] * 48)
        sizes.append(len(pickle.dumps(tracker)))
    assert sizes[-1] <= sizes[0] + 100
