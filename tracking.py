"""Follows detections from frame to frame: camera cuts, numbered objects, and boxes on frames that were skipped.

It knows neither the model nor the page. Detections are arrays (N, 6): box (xyxy, relative to the frame), score, label.
"""

import itertools
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
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

    detection: np.ndarray  # float64 (6,): smoothed, or predicted
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the centre, per frame, relative to the frame
    number: int = 0  # 0 until the object has been seen for `NEW_SECONDS`
    frames_seen: int = 1
    frames_missed: int = 0  # since then

    def predict(self) -> np.ndarray:
        """Moves to the next frame, and returns the detection that is expected there."""
        self.frames_missed += 1
        centre = (self.detection[:2] + self.detection[2:4]) / 2
        self.detection[:4] += np.tile((centre + self.velocity).clip(0, 1) - centre, 2)  # an object may leave and return
        return self.detection

    def update(self, detection: np.ndarray, alpha: float) -> None:
        """Corrects the prediction: by the share `alpha` of its error for the box, and by less for the velocity."""
        self.frames_seen, self.frames_missed = self.frames_seen + 1, 0
        errors = detection[:4] - self.detection[:4]
        self.detection[:4] += alpha * errors
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
        self._count: Counter[float] = Counter()  # objects of each label
        self._recent = deque([np.empty((0, 7))], max(1, round(TRAIL_SECONDS * fps)))  # numbered objects on each frame

    def update(self, frames: Sequence[np.ndarray], cuts: Sequence[bool]) -> list[np.ndarray]:
        """Appends object numbers to the detections on the next frames: (N, 6) in, (N, 7) out; 0 means no object.

        A new number also holds for the object's earlier detections in these frames. `cuts` tells for each frame whether
        a shot begins with it.
        """
        tracks = [self._track(*frame) for frame in zip(frames, cuts, strict=True)]
        numbers = [[track.number for track in found] for found in tracks]
        return [np.column_stack(frame) for frame in zip(frames, numbers, strict=True)]

    def _track(self, detections: np.ndarray, is_cut: bool) -> list[Track]:
        """The track of each detection."""
        tracks = [] if is_cut else self._tracks
        predicted = np.array([track.predict() for track in tracks]).reshape(-1, 6)
        is_new = np.array([track.number == 0 for track in tracks], bool)
        rows, columns = match(predicted, detections, NEW_TRACK_COST * is_new[:, None])
        found = [Track(detection.astype(float)) for detection in detections]
        for row, column in zip(rows, columns, strict=True):
            track = found[column] = tracks[row]
            track.update(detections[column], self._alpha)
            if track.frames_seen == self._frames_to_confirm:
                self._count[track.detection[5]] += 1
                track.number = self._count[track.detection[5]]
        lost = [track for track in tracks if track.number and 0 < track.frames_missed <= self._frames_to_keep]
        self._tracks = found + lost
        return found

    def trails(self, objects: np.ndarray) -> list[np.ndarray]:
        """For each object on the next frame, (N, 7), its centres on the frames before: (K, 2), oldest first, relative
        to the frame, from the last `TRAIL_SECONDS`."""
        recent = np.concatenate(self._recent)
        self._recent.append(objects[objects[:, 6] > 0])
        centres, labels, numbers = (recent[:, :2] + recent[:, 2:4]) / 2, *recent[:, 5:].T
        return [centres[(labels == label) & (numbers == number)] for label, number in objects[:, 5:]]


def match(some: np.ndarray, others: np.ndarray, penalties: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of detections (N, 6) and (M, 6) with the least total cost, each below `MAX_COST`: their indices.

    A pair costs its centre distance in box sizes, plus the absolute log ratios of widths and heights, plus its penalty.
    Classes do not match.
    """
    sizes, other_sizes = (np.maximum(found[:, 2:4] - found[:, :2], 1e-6) for found in (some, others))
    offsets = (some[:, :2] + some[:, 2:4])[:, None] / 2 - (others[:, :2] + others[:, 2:4]) / 2
    distances = np.linalg.norm(offsets / ((sizes[:, None] + other_sizes) / 2), axis=2)
    growth = np.abs(np.log(sizes[:, None] / other_sizes)).sum(axis=2)
    costs = np.where(some[:, None, 5] == others[:, 5], distances + growth, np.inf) + penalties
    rows, columns = linear_sum_assignment(np.minimum(costs, 2 * MAX_COST))
    is_pair = costs[rows, columns] < MAX_COST
    return rows[is_pair], columns[is_pair]


# ------------------------------------------------------------------------------------------------- skipped frames


def fill_gaps(detections: list[np.ndarray | None], cuts: Sequence[bool]) -> list[np.ndarray]:
    """Detections on all frames but the first, with interpolated ones on frames that have None.

    Args:
        detections: (N, 6) on each frame, where it is analysed. The first and the last one are.
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


def interpolate(before: np.ndarray, after: np.ndarray, fraction: float) -> np.ndarray:
    """Detections at a moment between two frames with detections (N, 6) and (M, 6); float32 (K, 6), best first.

    Matched boxes move linearly. Unmatched boxes stay in place: the earlier ones fade out before the middle of the gap,
    the later ones fade in after it. A low-scoring flicker therefore disappears quickly.
    """
    rows, columns = match(before, after)
    moved = (1 - fraction) * before[rows] + fraction * after[columns]
    alone = np.delete(before, rows, axis=0) if fraction < 0.5 else np.delete(after, columns, axis=0)
    faded = alone * (1, 1, 1, 1, abs(1 - 2 * fraction), 1)
    filled = np.concatenate((moved, faded)).astype(np.float32)
    return filled[np.argsort(-filled[:, 4], kind="stable")]
