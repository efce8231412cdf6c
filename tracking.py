"""Follows detections from frame to frame: camera cuts, numbered objects, and boxes on frames that were skipped.

It knows neither the model nor the page.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

# Mean difference between thumbnails of consecutive frames (0 to 255), and its ratio to the previous difference. In a
# film at 25 and 12.5 frames per second, cuts changed 43 to 81. The fastest motion changed up to 31, but the frame
# before it had changed just as much. These limits found all 5 and 10 cuts, and nothing else; with a ratio of 2,
# 2 of 10 were missed.
CUT_CHANGE, CUT_FACTOR = 25, 1.5

# Tuned on 144 rendered scenes with known objects; tests/README.md has the figures.
LOST_SECONDS = 1.2  # how long an object keeps its number while out of sight
NEW_SECONDS = 0.25  # how long a new object waits for its number
SMOOTHING_SECONDS = 0.16  # time constant of the boxes that the tracker predicts from
NEW_TRACK_COST = 1  # for an object without a number: those that have one come first
MAX_COST = 2.5  # upper limit for two detections to match; 2.0 to 3.5 change interpolated frames by less than 1 %
TRAIL_SECONDS = 1.5


@dataclass(eq=False, slots=True)
class Detections:
    """What was found on one frame: N boxes. The names are those of `supervision.Detections`."""

    xyxy: np.ndarray  # float32 (N, 4): left, top, right, bottom, relative to the frame (0 to 1)
    confidence: np.ndarray  # float32 (N,), 0 to 1
    class_id: np.ndarray  # int (N,)
    tracker_id: np.ndarray | None = None  # int (N,): number of the object in its class, from 1; 0 for none, the default

    def __post_init__(self):
        if self.tracker_id is None:
            self.tracker_id = np.zeros(len(self.xyxy), int)

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, index: np.ndarray | slice) -> Detections:
        """Those of a mask (N,), of indices, or of a slice."""
        return Detections(self.xyxy[index], self.confidence[index], self.class_id[index], self.tracker_id[index])

    @classmethod
    def empty(cls) -> Detections:
        return cls(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, int))

    @classmethod
    def merge(cls, parts: Iterable[Detections]) -> Detections:
        """All in one, in the same order."""
        columns = [(part.xyxy, part.confidence, part.class_id, part.tracker_id) for part in (cls.empty(), *parts)]
        return cls(*map(np.concatenate, zip(*columns, strict=True)))


class CutFinder:
    """Finds cuts: changes of the picture that are large and sudden. A fast pan is only large."""

    def __init__(self):
        self._thumbnail, self._change = None, 0.0

    def __call__(self, image: np.ndarray) -> bool:
        """Whether a shot begins with this frame, uint8 (height, width, 3), after the one of the last call."""
        thumbnail = cv2.resize(image, (32, 18), interpolation=cv2.INTER_NEAREST)  # 0.01 ms, also from 1080p
        change = 0.0 if self._thumbnail is None else float(cv2.absdiff(thumbnail, self._thumbnail).mean())
        is_cut = change > max(CUT_CHANGE, CUT_FACTOR * self._change)
        self._thumbnail, self._change = thumbnail, change
        return is_cut


@dataclass
class Track:
    """An object's box in an alpha-beta filter, which expects a constant velocity and size inside the frame."""

    box: np.ndarray  # float64 (4,), xyxy: smoothed, or predicted
    class_id: int
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the centre, per frame, relative to the frame
    number: int = 0  # 0 until the object has been seen for `NEW_SECONDS`
    frames_seen: int = 1
    frames_missed: int = 0  # since then

    def predict(self) -> None:
        """Moves to where the object is expected on the next frame."""
        self.frames_missed += 1
        centre = (self.box[:2] + self.box[2:]) / 2
        self.box += np.tile((centre + self.velocity).clip(0, 1) - centre, 2)  # an object may leave and return

    def update(self, box: np.ndarray, alpha: float) -> None:
        """Corrects the prediction: by the share `alpha` of its error for the box, and by less for the velocity."""
        self.frames_seen, self.frames_missed = self.frames_seen + 1, 0
        errors = box - self.box
        self.box += alpha * errors
        self.velocity += alpha**2 / (2 - alpha) * (errors[:2] + errors[2:]) / 2  # Benedict and Bordner, 1962


class ObjectTracker:
    """Numbers the objects of a video, each class from 1.

    A number stays while its object is out of sight for up to `LOST_SECONDS`, and ends at a cut.

    Args:
        fps: Of the output.
    """

    def __init__(self, fps: Fraction):
        self._frames_to_confirm = max(2, round(NEW_SECONDS * fps))
        self._frames_to_keep = round(LOST_SECONDS * fps)
        self._alpha = 1 - math.exp(-1 / (SMOOTHING_SECONDS * fps))
        self._tracks: list[Track] = []
        self._count: Counter[int] = Counter()  # objects of each class
        self._recent: deque[Detections] = deque(maxlen=max(1, round(TRAIL_SECONDS * fps)))  # those with numbers

    def update(self, frames: Sequence[Detections], cuts: Sequence[bool]) -> list[Detections]:
        """The detections on the next frames with their objects' numbers.

        A new number also holds for the object's earlier detections in these frames. `cuts` tells for each frame whether
        a shot begins with it.
        """
        tracks = [self._track(*frame) for frame in zip(frames, cuts, strict=True)]
        numbers = [np.array([track.number for track in found], int) for found in tracks]
        return [replace(found, tracker_id=ids) for found, ids in zip(frames, numbers, strict=True)]

    def _track(self, detections: Detections, is_cut: bool) -> list[Track]:
        """The track of each detection."""
        tracks = [] if is_cut else self._tracks
        for track in tracks:
            track.predict()
        boxes = np.array([track.box for track in tracks]).reshape(-1, 4)
        classes = np.array([track.class_id for track in tracks], int)
        predicted = Detections(boxes, np.ones(len(tracks)), classes)
        is_new = np.array([track.number == 0 for track in tracks], bool)
        rows, columns = match(predicted, detections, NEW_TRACK_COST * is_new[:, None])
        found = list(map(Track, detections.xyxy.astype(float), detections.class_id.tolist()))
        for row, column in zip(rows, columns, strict=True):
            track = found[column] = tracks[row]
            track.update(detections.xyxy[column], self._alpha)
            if track.frames_seen == self._frames_to_confirm:
                self._count[track.class_id] += 1
                track.number = self._count[track.class_id]
        lost = [track for track in tracks if track.number and 0 < track.frames_missed <= self._frames_to_keep]
        self._tracks = found + lost
        return found

    def trails(self, detections: Detections) -> list[np.ndarray]:
        """For each detection on the next frame, its object's centres on the frames before: (K, 2), oldest first,
        relative to the frame, from the last `TRAIL_SECONDS`."""
        recent = Detections.merge(self._recent)
        self._recent.append(detections[detections.tracker_id > 0])
        centres = (recent.xyxy[:, :2] + recent.xyxy[:, 2:]) / 2
        objects = zip(detections.class_id, detections.tracker_id, strict=True)
        return [centres[(recent.class_id == label) & (recent.tracker_id == number)] for label, number in objects]


def match(some: Detections, others: Detections, penalties: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of N and M detections with the least total cost, each below `MAX_COST`: their indices.

    A pair costs its centre distance in box sizes, plus the absolute log ratios of widths and heights, plus its penalty,
    (N, M) or (N, 1). Classes do not match.
    """
    sizes, other_sizes = (np.maximum(found.xyxy[:, 2:] - found.xyxy[:, :2], 1e-6) for found in (some, others))
    centres, other_centres = ((found.xyxy[:, :2] + found.xyxy[:, 2:]) / 2 for found in (some, others))
    offsets = centres[:, None] - other_centres
    distances = np.linalg.norm(offsets / ((sizes[:, None] + other_sizes) / 2), axis=2)
    growth = np.abs(np.log(sizes[:, None] / other_sizes)).sum(axis=2)
    costs = np.where(some.class_id[:, None] == others.class_id, distances + growth, np.inf) + penalties
    rows, columns = linear_sum_assignment(np.minimum(costs, 2 * MAX_COST))
    is_pair = costs[rows, columns] < MAX_COST
    return rows[is_pair], columns[is_pair]


# ------------------------------------------------------------------------------------------------- skipped frames


def fill_gaps(detections: list[Detections | None], cuts: Sequence[bool]) -> list[Detections]:
    """Detections on all frames but the first, with interpolated ones on frames that have None.

    Args:
        detections: On each frame, where it is analysed. The first and the last one are.
        cuts: For each frame but the first, whether a shot begins with it. Nothing moves across a cut.
    """
    filled, analysed = [], [index for index, found in enumerate(detections) if found is not None]
    for first, last in itertools.pairwise(analysed):
        before, after = detections[first], detections[last]
        shots = first + 1 + np.flatnonzero(cuts[first:last])  # where they begin
        for index in range(first + 1, last):
            if not len(shots):
                filled.append(interpolate(before, after, (index - first) / (last - first)))
            else:
                filled.append(before if index < shots[0] else after if index >= shots[-1] else before[:0])
        filled.append(after)
    return filled


def interpolate(before: Detections, after: Detections, fraction: float) -> Detections:
    """Detections at a moment between two frames, best first.

    Matched boxes move linearly. Unmatched boxes stay in place: the earlier ones fade out before the middle of the gap,
    the later ones fade in after it. A low-scoring flicker therefore disappears quickly.
    """
    rows, columns = match(before, after)
    moved, there = before[rows], after[columns]
    moved.xyxy += np.float32(fraction) * (there.xyxy - moved.xyxy)
    moved.confidence += np.float32(fraction) * (there.confidence - moved.confidence)
    is_early = fraction < 0.5
    alone, matched = (before, rows) if is_early else (after, columns)
    faded = alone[np.delete(np.arange(len(alone)), matched)]
    faded.confidence *= np.float32(abs(1 - 2 * fraction))
    filled = Detections.merge((moved, faded))
    return filled[np.argsort(-filled.confidence, kind="stable")]
