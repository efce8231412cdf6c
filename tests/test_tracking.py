"""Objects keep their numbers, and as many are counted as there are, and as cross a line. Tuned on other seeds."""

import dataclasses
import pickle
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import scenes
import shapes

import tracking
from tracking import Detections

SEEDS = (7, 8)
THRESHOLD = 0.30
BATCH = 16  # frames that are numbered together


@pytest.fixture(scope="module")
def videos() -> list[tuple[list[scenes.SceneFrame], list[Detections]]]:
    """The rendered frames, and the detections that are shown on them."""
    import app  # loads the model, which the other tests here do without

    return [scenes.render_and_detect(app.DETECTOR, kind, seed) for kind in scenes.KINDS for seed in SEEDS]


def track(frames: list[Detections], fps: float, cuts: list[bool] | None = None) -> list[Detections]:
    """The detections with their numbers, as the app gets them: batch by batch."""
    tracker, cuts = tracking.ObjectTracker(fps), cuts or [False] * len(frames)
    batches = [slice(start, start + BATCH) for start in range(0, len(frames), BATCH)]
    return [found for batch in batches for found in tracker.update(frames[batch], cuts[batch])]


@pytest.fixture(scope="module")
def tracked(videos) -> list[tuple[list[Detections], list[Detections]]]:
    """For each video, what is shown, with numbers, and the truth."""
    results = []
    for frames, found in videos:
        is_cut = tracking.CutFinder()
        shown = [detections[detections.confidence > THRESHOLD] for detections in found]
        numbered = track(shown, scenes.FPS, [is_cut(frame.image) for frame in frames])
        results.append((numbered, [frame.truth for frame in frames]))
    return results


def kept(tracked: list[Detections], truth: list[Detections]) -> tuple[int, int]:
    """The sightings in which an object has the number that it has most often, and all sightings."""
    numbers_of = defaultdict(Counter)
    for found, true in zip(tracked, truth, strict=True):
        for i, j in scenes.match(found, true):
            numbers_of[true.tracker_id[j]][found.tracker_id[i]] += 1
    usual = (max((n for number, n in counts.items() if number), default=0) for counts in numbers_of.values())
    return sum(usual), sum(counts.total() for counts in numbers_of.values())


def sightings(frames: list[Detections]) -> Counter:
    """How often each object was seen, by class and number."""
    pairs = (zip(found.class_id, found.tracker_id, strict=True) for found in frames)
    return Counter((label, number) for frame in pairs for label, number in frame if number)


def test_an_object_keeps_its_number(tracked):
    usual, total = np.sum([kept(*video) for video in tracked], axis=0)
    assert total > 3000
    assert usual / total >= 0.92


def test_as_many_objects_count_as_there_are(tracked):
    from results import COUNTED_SECONDS

    counted, true = (
        sum(n / scenes.FPS >= COUNTED_SECONDS for video in tracked for n in sightings(video[part]).values())
        for part in (0, 1)
    )
    assert abs(counted / true - 1) <= 0.15


@pytest.mark.parametrize(
    ("camera", "missing", "doubles", "least_kept"),
    [
        ("still", 0.1, 0, 0.94),
        ("still", 0.25, 0.1, 0.88),
        ("shakes", 0.1, 0, 0.93),
        ("shakes and pans", 0.1, 0, 0.90),
        ("drives", 0.1, 0, 0.88),
    ],
)
def test_people_keep_their_numbers_in_front_of_a_camera_that(camera, missing, doubles, least_kept):
    usual = total = numbers = people = 0
    for seed in range(40, 48):
        found, truth = scenes.people(camera, seed, missing=missing, doubles=doubles)
        numbered = track(found, fps=15)
        usual, total = np.add((usual, total), kept(numbered, truth))
        numbers, people = numbers + len(sightings(numbered)), people + len(sightings(truth))
    assert total > 2500
    assert usual / total >= least_kept
    assert 0.8 <= numbers / people <= 1.2


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


def test_a_new_object_may_be_missed_once():
    frames = on_the_way(12)
    frames[2] = NOTHING
    assert numbers_on(frames) == [[1]] * 2 + [[]] + [[1]] * 9


def test_the_confident_one_of_two_boxes_on_one_object_gets_its_number():
    frames = on_the_way(12)
    double = frames[-1][:]
    double.confidence = double.confidence - 0.5
    frames[-1] = Detections.merge((double, frames[-1]))
    assert numbers_on(frames)[-1] == [0, 1]


ROW = Detections.merge([one(x, y) for x, y in ((0.1, 0.1), (0.25, 0.5), (0.4, 0.2), (0.6, 0.6), (0.75, 0.3))])


def moved(detections: Detections, x: float, y: float) -> Detections:
    return dataclasses.replace(detections, xyxy=detections.xyxy + np.array([x, y, x, y], np.float32))


def test_numbers_stay_when_the_whole_picture_jumps():
    frames = [*[ROW] * 12, moved(ROW, 0.25, 0.1)[1:], moved(ROW, -0.05, -0.1)[:4]]
    assert numbers_on(frames)[-2:] == [[2, 3, 4, 5], [1, 2, 3, 4]]


def test_what_is_missing_is_not_taken_for_a_movement_of_the_camera():
    tracks = np.zeros(5, tracking.TRACK)
    tracks["xyxy"], tracks["frames_missed"] = ROW.xyxy, 1
    jump = np.array([0.15, 0.1])
    np.testing.assert_allclose(tracking.camera_shift(tracks, moved(ROW, *jump)[1:]), jump, atol=1e-6)
    assert not tracking.camera_shift(tracks, ROW[2:]).any()
    assert not tracking.camera_shift(tracks, moved(ROW[:2], *jump)).any()


def test_what_flickers_has_no_number():
    frames = on_the_way(12)
    frames[5] = Detections.merge((frames[5], one(0.7)))
    assert numbers_on(frames)[5] == [1, 0]


def test_detections_are_chosen_and_merged_with_all_that_is_known_of_them():
    numbered = dataclasses.replace(Detections.merge((one(0.1), one(0.7, class_id=3))), tracker_id=np.array([4, 5]))
    for part in (numbered[1:], numbered[np.array([1])], numbered[numbered.class_id == 3]):
        assert (len(part), part.xyxy[0, 0], part.class_id[0], part.tracker_id[0]) == (1, np.float32(0.7), 3, 5)
    merged = Detections.merge((numbered[1:], numbered[:1]))
    assert merged.tracker_id.tolist() == [5, 4]
    empty = Detections.merge([])
    assert (len(empty), empty.xyxy.shape, empty.xyxy.dtype, empty.class_id.dtype) == (0, (0, 4), np.float32, int)


def test_a_tracker_that_was_pickled_goes_on():
    tracker = tracking.ObjectTracker(12)
    tracker.update(on_the_way(6), [False] * 6)
    copy = pickle.loads(pickle.dumps(tracker))
    assert copy.update(on_the_way(1, start=0.16), [False])[0].tracker_id.tolist() == [1]


def test_the_tracker_does_not_grow_with_the_video(tmp_path):
    tracker, rng = tracking.ObjectTracker(12), np.random.default_rng(4)
    sizes = []
    for _ in range(40):  # 40 objects come and go, 48 frames each
        frames = on_the_way(24, start=rng.uniform(0, 0.6)) + [NOTHING] * 24
        tracked = tracker.update(frames, [False] * 48)
        tracker.look((index, IMAGE, found) for index, found in enumerate(tracked))
        assert len(tracker.take_pictures(tmp_path)) == 1
        sizes.append(len(pickle.dumps(tracker)))
    assert sizes[-1] <= sizes[0] + 100


# ---------------------------------------------------------------------------------------------------------- lines


def crossings(
    frames: list[Detections],
    lines: np.ndarray,
    fps: float,
    cuts: list[bool] | None = None,
    batch: int = BATCH,
    aspect_ratio: float = scenes.ASPECT_RATIO,
) -> list[tracking.Crossing]:
    """As the app finds them, batch by batch, with a copy of the tracker and of the counter in each."""
    tracker, counter = tracking.ObjectTracker(fps), tracking.LineCounter(lines, fps)
    found, cuts = [], cuts or [False] * len(frames)
    for start in range(0, len(frames), batch):
        tracker, counter = pickle.loads(pickle.dumps((tracker, counter)))
        part = slice(start, start + batch)
        tracked = tracker.update(frames[part], cuts[part])
        for index, (detections, track_ids) in enumerate(zip(tracked, tracker.track_ids, strict=True), start):
            found += counter.update(detections, track_ids, index, aspect_ratio)
    into = [[sum(c.line == line and c.is_in == is_in for c in found) for is_in in (1, 0)] for line in range(len(lines))]
    assert counter.counts.tolist() == into
    return found


def skip_frames(frames: list[Detections], step: int) -> list[Detections]:
    """What is shown if one frame in `step` is analysed."""
    last = len(frames) - 1
    analysed = [found if index % step in (0, last % step) else None for index, found in enumerate(frames)]
    return [found[found.confidence > THRESHOLD] for found in (frames[0], *tracking.fill_gaps(analysed, [False] * last))]


@pytest.mark.parametrize(("fps", "step", "missing"), [(15, 1, 0.1), (30, 7, 0)])
def test_who_crosses_a_line_is_counted_in_the_right_direction(fps, step, missing):
    """Slow and fast, hidden meanwhile, to and fro, swaying on the line, beside it and along it, several at once."""
    counted = invented = true = 0
    for seed in range(1000, 1020):
        frames, line, truth = scenes.passers(seed, fps, missing=missing)
        left = list(truth)
        for crossing in sorted(crossings(skip_frames(frames, step) if step > 1 else frames, [line], fps)):
            alike = [t for t in left if (t.is_in, t.class_id) == (crossing.is_in, crossing.class_id)]
            late = [abs(t.seconds - crossing.source_index / fps) for t in alike]
            if min(late, default=9) < 2:
                left.remove(alike[int(np.argmin(late))])
                counted += 1
            else:
                invented += 1
        true += len(truth)
    assert true > 40
    assert counted / true >= 0.97
    assert invented / true <= 0.03


@pytest.mark.parametrize("seed", range(2000, 2004))
def test_who_stands_on_a_line_and_sways_is_not_counted(seed):
    frames, line, truth = scenes.passers(seed, 15, ["sways", "sways and returns"], count=1)
    assert not truth
    assert not crossings(frames, [line], 15)


DOWN_THE_MIDDLE = [0.5, 0.1, 0.5, 0.9]  # "in" is to the left


def to_the_right(first: float = 0.3, last: float = 0.7, count: int = 24) -> list[Detections]:
    """An object of width 0.1 whose centre moves from `first` to `last`."""
    return [one(x - 0.05) for x in np.linspace(first, last, count)]


def test_the_right_of_a_lines_way_is_in():
    (out,), (into,) = (crossings(frames, [DOWN_THE_MIDDLE], 12) for frames in (to_the_right(), to_the_right()[::-1]))
    assert (out.is_in, into.is_in) == (False, True)
    assert (out.line, out.class_id, out.number) == (0, 0, 1)
    assert out.source_index == 12, "the first frame beyond"


def test_each_line_counts_by_itself_and_only_between_its_ends():
    lines = [DOWN_THE_MIDDLE, [0.6, 0.9, 0.6, 0.1], [0.5, 0.1, 0.5, 0.5]]  # the feet are at 0.6
    assert [(found.line, found.is_in) for found in crossings(to_the_right(), lines, 12)] == [(0, False), (1, True)]


def test_the_margin_is_the_same_in_wide_and_in_tall_pictures():
    """A line from corner to corner: seen from it, a box that is square in the picture is as wide as high."""
    for aspect_ratio in (16 / 9, 9 / 16):
        for beyond, count in ((0.15, 0), (0.25, 1)):
            size = np.array([0.1 / aspect_ratio, 0.1])
            normal = np.array([-1, aspect_ratio]) / np.hypot(1, aspect_ratio)  # of the picture's diagonal, in heights
            extent = abs(normal).sum() * 0.1
            ways = np.outer(np.linspace(-1, beyond, 24) * extent, normal) / (aspect_ratio, 1) + 0.5
            boxes = np.column_stack((ways - size * (0.5, 1), ways + size * (0.5, 0))).astype(np.float32)
            frames = [Detections(box[None], np.array([0.9], np.float32), np.array([0])) for box in boxes]
            assert len(crossings(frames, [[0, 0, 1, 1]], 12, aspect_ratio=aspect_ratio)) == count


def test_who_is_lost_on_one_side_and_found_on_the_other_has_crossed():
    frames = to_the_right()
    frames[8:16] = [NOTHING] * 8
    assert [found.source_index for found in crossings(frames, [DOWN_THE_MIDDLE], 12)] == [16]


def test_nobody_crosses_at_a_cut():
    frames = [*to_the_right(0.3, 0.42, 12), *to_the_right(0.58, 0.7, 12)]
    assert len(crossings(frames, [DOWN_THE_MIDDLE], 12)) == 1
    assert not crossings(frames, [DOWN_THE_MIDDLE], 12, cuts=[index == 12 for index in range(24)])


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_crossing_counts_even_before_its_object_has_a_number(batch):
    frames = to_the_right(0.47, 0.7, 20)
    (found,) = crossings(frames, [DOWN_THE_MIDDLE], 60, batch=batch)
    assert found.source_index < 60 * tracking.NEW_SECONDS
    assert found.number == 1


def test_a_crossed_line_is_lit_for_half_a_second():
    counter = tracking.LineCounter([DOWN_THE_MIDDLE, [0, 0, 0, 1]], 12)
    tracked = track(to_the_right(), 12)
    lit = []
    for index, detections in enumerate(tracked):
        counter.update(detections, [0] * len(detections), index, 1)
        lit.append(counter.is_lit.tolist())
    assert sum(first for first, _ in lit) == 6
    assert not any(second for _, second in lit)


# -------------------------------------------------------------------------------------------- pictures of the objects

IMAGE = np.random.default_rng(0).integers(0, 256, (540, 960, 3), np.uint8)  # noise: the largest JPEG


def pictures_of(tracker: tracking.ObjectTracker, frames: list[Detections], folder: Path) -> list[tuple[int, int]]:
    """The number and the frame of each picture that a chunk of these frames brings. Their files are checked."""
    tracked = tracker.update(frames, [False] * len(frames))
    tracker.look((index, IMAGE, found) for index, found in enumerate(tracked))
    pictures = tracker.take_pictures(folder)
    for picture in pictures:
        assert Path(picture.path).stat().st_size <= tracking.PICTURE_BYTES
        image = cv2.imread(picture.path)
        assert max(image.shape) <= tracking.PICTURE_SIDE
    return [(picture.tracker_id, picture.source_index) for picture in pictures]


def test_a_picture_comes_once_per_chunk_and_only_if_it_is_better(tmp_path):
    tracker = tracking.ObjectTracker(12)
    widths = 0.1 + 0.3 * np.sin(np.linspace(0, np.pi, 24))
    nearer = [one(0.2, width=width) for width in widths]
    assert pictures_of(tracker, nearer[:10], tmp_path) == [(1, 9)]
    assert pictures_of(tracker, nearer[10:14], tmp_path) in ([(1, 1)], [(1, 2)])
    assert pictures_of(tracker, nearer[14:], tmp_path) == []
    tracker = pickle.loads(pickle.dumps(tracker))  # as ZeroGPU does
    assert pictures_of(tracker, nearer[::-1], tmp_path) == []


def test_an_object_is_seen_best_where_it_is_large_surely_found_whole_and_free():
    def quality(*found: Detections) -> float:
        """Of the first one."""
        numbered = dataclasses.replace(Detections.merge(found), tracker_id=np.arange(1, len(found) + 1))
        return tracking.visibility(numbered)[0]

    unsure, apart, behind = one(0.4), one(0.6), one(0.43, class_id=1)
    unsure.confidence = unsure.confidence - 0.2
    best = quality(one(0.4), apart)
    assert best == quality(one(0.4))
    for worse in ((one(0.4, width=0.08),), (unsure,), (one(0.9, width=0.12),), (one(0.4), behind)):
        assert quality(*worse) < best
    assert quality(one(0.9, width=0.12)) < quality(one(0.4, width=0.02)), "better small than cut off"


def test_what_has_no_number_has_no_picture(tmp_path):
    tracker = tracking.ObjectTracker(12)
    assert pictures_of(tracker, on_the_way(2), tmp_path) == []
    assert pictures_of(tracker, on_the_way(4, start=0.12), tmp_path) == [(1, 0)], "its number came late"


def test_a_tall_and_thin_object_has_a_picture_with_a_margin(tmp_path):
    box = np.array([0.5, 0.1, 0.501, 0.9])
    assert tracking.cut_out(IMAGE, box).shape == (520, 89, 3)
