"""Detections on frames that the model has not seen. Tuned on seeds 100 to 111, tested on others."""

import numpy as np
import pytest
import scenes

import tracking
from tracking import Detections

SEEDS = range(1, 11)
FPS = 14  # every 7th frame is one in half a second: analysed frames are never further apart
THRESHOLD = 0.30


def fill_gap(before: Detections, after: Detections, cuts: list[bool]) -> list[Detections]:
    """The frames between two analysed ones. `cuts` is for these and the later one."""
    return tracking.fill_gaps([before, *[None] * (len(cuts) - 1), after], cuts)[:-1]


@pytest.fixture(scope="module")
def videos() -> list[list[Detections]]:
    """The detections on every frame of ordinary scenes."""
    import app  # loads the model, which the other tests here do without

    return [scenes.render_and_detect(app.DETECTOR, "ordinary", seed, FPS, seconds=4)[1] for seed in SEEDS]


@pytest.mark.parametrize("step", [4, 7])
def test_filled_frames_are_like_analysed_ones(videos, step):
    overlaps, expected, shown = [], 0, 0
    for frames in videos:
        for start in range(0, len(frames) - step, step):
            filled = fill_gap(frames[start], frames[start + step], [False] * step)
            for real, made in zip(frames[start + 1 : start + step], filled, strict=True):
                real, made = (found[found.confidence > THRESHOLD] for found in (real, made))
                table = scenes.overlaps(made, real)
                overlaps += [table[pair] for pair in scenes.match(made, real)]
                expected, shown = expected + len(real), shown + len(made)
    assert expected > 1000
    assert np.mean(overlaps) >= 0.85
    assert len(overlaps) / expected >= 0.93
    assert len(overlaps) / shown >= 0.94


def detections(*rows: tuple[float, float, float, int]) -> Detections:
    """Boxes of 0.1 by 0.2 at x and y, with a score and a class; the best first."""
    x, y, score, class_id = np.array(rows, np.float32).reshape(-1, 4).T
    boxes = np.column_stack((x, y, x + np.float32(0.1), y + np.float32(0.2)))
    return Detections(boxes, score, class_id.astype(int))


def assert_alike(some: Detections, others: Detections):
    np.testing.assert_allclose(some.xyxy, others.xyxy, atol=1e-6)
    np.testing.assert_allclose(some.confidence, others.confidence, atol=1e-6)
    np.testing.assert_array_equal(some.class_id, others.class_id)


def test_a_box_glides_from_place_to_place():
    before, after = detections((0.1, 0.5, 0.8, 2)), detections((0.2, 0.4, 0.6, 2))
    filled = fill_gap(before, after, [False] * 4)
    assert_alike(filled[0], detections((0.125, 0.475, 0.75, 2)))
    assert_alike(filled[2], detections((0.175, 0.425, 0.65, 2)))
    assert all(frame.xyxy.dtype == frame.confidence.dtype == np.float32 for frame in filled)


def test_boxes_do_not_glide_from_class_to_class_nor_across_the_picture():
    before = detections((0.1, 0.5, 0.8, 0), (0.5, 0.1, 0.7, 1))
    after = detections((0.1, 0.5, 0.8, 2), (0.9, 0.1, 0.7, 1))
    early, late = tracking.interpolate(before, after, 0.25), tracking.interpolate(before, after, 0.75)
    for found, expected in ((early, before), (late, after)):
        np.testing.assert_array_equal(found.xyxy, expected.xyxy)
        np.testing.assert_array_equal(found.class_id, expected.class_id)


def test_what_is_on_one_side_only_fades():
    nothing, something = detections(), detections((0.1, 0.5, 0.8, 0))
    going = fill_gap(something, nothing, [False] * 8)
    coming = fill_gap(nothing, something, [False] * 8)
    for frames in (going, coming[::-1]):
        scores = [frame.confidence.max(initial=0) for frame in frames]
        np.testing.assert_allclose(scores, [0.6, 0.4, 0.2, 0, 0, 0, 0], atol=1e-6)


def test_nothing_moves_across_a_cut():
    before, after = detections((0.1, 0.5, 0.8, 0)), detections((0.2, 0.5, 0.8, 0))
    filled = fill_gap(before, after, [False, False, True, False])
    assert [frame.xyxy[0, 0].round(3) for frame in filled] == [np.float32(x).round(3) for x in (0.1, 0.1, 0.2)]


def test_between_two_cuts_nothing_is_shown():
    before, after = detections((0.1, 0.5, 0.8, 0)), detections((0.2, 0.5, 0.8, 0))
    filled = fill_gap(before, after, [False, True, False, True])
    assert [len(frame) for frame in filled] == [1, 0, 0]


def test_a_gap_of_no_frames_is_filled_with_none():
    assert fill_gap(detections((0.1, 0.5, 0.8, 0)), detections(), [False]) == []
