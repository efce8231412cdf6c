"""Detections on frames that the model has not seen. Tuned on seeds 100 to 111, tested on others."""

import numpy as np
import pytest
import scenes

import app
import tracking

SEEDS = range(1, 11)
FPS = 14  # every 7th frame is one in half a second: analysed frames are never further apart
THRESHOLD = 0.30


def fill_gap(before: np.ndarray, after: np.ndarray, cuts: list[bool]) -> list[np.ndarray]:
    """The frames between two analysed ones. `cuts` is for these and the later one."""
    return tracking.fill_gaps([before, *[None] * (len(cuts) - 1), after], cuts)[:-1]


@pytest.fixture(scope="module")
def videos() -> list[list[np.ndarray]]:
    """The detections on every frame of ordinary scenes."""
    return [scenes.render_and_detect(app.DETECTOR, "ordinary", seed, FPS, seconds=4)[1] for seed in SEEDS]


@pytest.mark.parametrize("step", [4, 7])
def test_filled_frames_are_like_analysed_ones(videos, step):
    overlaps, expected, shown = [], 0, 0
    for found in videos:
        for start in range(0, len(found) - step, step):
            filled = fill_gap(found[start], found[start + step], [False] * step)
            for real, made in zip(found[start + 1 : start + step], filled, strict=True):
                real, made = (detections[detections[:, 4] > THRESHOLD] for detections in (real, made))
                real = real[:, [0, 1, 2, 3, 5]]
                table = scenes.overlaps(made, real)
                overlaps += [table[pair] for pair in scenes.match(made, real)]
                expected, shown = expected + len(real), shown + len(made)
    assert expected > 1000
    assert np.mean(overlaps) >= 0.85
    assert len(overlaps) / expected >= 0.93
    assert len(overlaps) / shown >= 0.94


def detections(*rows: tuple[float, float, float, int]) -> np.ndarray:
    """Boxes of 0.1 by 0.2 at x and y, with a score and a label number; the best first."""
    return np.array([(x, y, x + 0.1, y + 0.2, score, label) for x, y, score, label in rows], np.float32)


def test_a_box_glides_from_place_to_place():
    before, after = detections((0.1, 0.5, 0.8, 2)), detections((0.2, 0.4, 0.6, 2))
    filled = fill_gap(before, after, [False] * 4)
    np.testing.assert_allclose(filled[0], detections((0.125, 0.475, 0.75, 2)), atol=1e-6)
    np.testing.assert_allclose(filled[2], detections((0.175, 0.425, 0.65, 2)), atol=1e-6)
    assert all(frame.dtype == np.float32 for frame in filled)


def test_boxes_do_not_glide_from_class_to_class_nor_across_the_picture():
    before = detections((0.1, 0.5, 0.8, 0), (0.5, 0.1, 0.7, 1))
    after = detections((0.1, 0.5, 0.8, 2), (0.9, 0.1, 0.7, 1))
    early, late = tracking.interpolate(before, after, 0.25), tracking.interpolate(before, after, 0.75)
    np.testing.assert_array_equal(early[:, [0, 1, 2, 3, 5]], before[:, [0, 1, 2, 3, 5]])
    np.testing.assert_array_equal(late[:, [0, 1, 2, 3, 5]], after[:, [0, 1, 2, 3, 5]])


def test_what_is_on_one_side_only_fades():
    nothing, something = np.empty((0, 6), np.float32), detections((0.1, 0.5, 0.8, 0))
    going = fill_gap(something, nothing, [False] * 8)
    coming = fill_gap(nothing, something, [False] * 8)
    for frames in (going, coming[::-1]):
        scores = [frame[:, 4].max(initial=0) for frame in frames]
        np.testing.assert_allclose(scores, [0.6, 0.4, 0.2, 0, 0, 0, 0], atol=1e-6)


def test_nothing_moves_across_a_cut():
    before, after = detections((0.1, 0.5, 0.8, 0)), detections((0.2, 0.5, 0.8, 0))
    filled = fill_gap(before, after, [False, False, True, False])
    assert [frame[0, 0].round(3) for frame in filled] == [np.float32(x).round(3) for x in (0.1, 0.1, 0.2)]


def test_between_two_cuts_nothing_is_shown():
    before, after = detections((0.1, 0.5, 0.8, 0)), detections((0.2, 0.5, 0.8, 0))
    filled = fill_gap(before, after, [False, True, False, True])
    assert [len(frame) for frame in filled] == [1, 0, 0]


def test_a_gap_of_no_frames_is_filled_with_none():
    assert fill_gap(detections((0.1, 0.5, 0.8, 0)), detections(), [False]) == []
