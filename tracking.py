"""Follows detections from frame to frame: camera cuts, numbered objects, their pictures, the lines that they cross,
and boxes on frames that were skipped.

It knows neither the model nor the page.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

# Mean difference between thumbnails of consecutive frames (0 to 255), and its ratio to the previous difference. In a
# film at 25 and 12.5 frames per second, cuts changed 43 to 81. The fastest motion changed up to 31, but the frame
# before it had changed just as much. These limits found all 5 and 10 cuts, and nothing else; with a ratio of 2,
# 2 of 10 were missed.
CUT_CHANGE, CUT_FACTOR = 25, 1.5

# Chosen on rendered scenes, on simulated people and on a public sequence of real ones; tests/README.md has the figures.
LOST_SECONDS = 1.5  # how long an object keeps its number while out of sight
NEW_SECONDS = 0.25  # how long a new object must be seen for its number
NEW_WEIGHT = 0.1  # of a match with an object that has no number yet: those that have one come first
SMOOTHING_SECONDS = 0.16  # time constant of the boxes that the tracker predicts from
NEAR = 0.4  # box sizes: at this distance, two boxes are 1/e as alike as in the same place
MIN_LIKENESS = 0.005  # for two boxes to match: at most 2.1 box sizes apart
SHIFT_PROPOSERS, SHIFT_VOTERS = 3, 12  # objects that tell how the camera has moved; more take longer
TRAIL_SECONDS = 1.5
LINE_MARGIN = 0.2  # of an object's size: so far beyond a line, it has crossed
LIT_SECONDS = 0.5  # how long a crossed line lights up

PICTURE_SIDE, PICTURE_MARGIN = 192, 0.1  # of an object: pixels of the longer side at most; around the box, of its sides
PICTURE_BYTES = 8192  # at most
EDGE = 0.01  # of the frame: a box that comes closer to its edge may be cut off


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


# An object that is followed, or that may become one. The box follows it in an alpha-beta filter, which expects a
# constant velocity (of the centre, relative to the frame, per frame) and size.
TRACK = np.dtype([
    ("xyxy", float, 4), ("velocity", float, 2), ("class_id", int),
    ("id", int),  # of this track, unique in the video
    ("number", int),  # of the object in its class; 0 until it has been seen for `NEW_SECONDS`
    ("frames_seen", int), ("frames_missed", int),  # the latter since it was last seen
])  # fmt: skip


class Picture(NamedTuple):
    """An object where it is seen best so far."""

    class_id: int
    tracker_id: int
    source_index: int  # of the frame
    path: str  # of a JPEG file, at most `PICTURE_BYTES` long


class ObjectTracker:
    """Numbers the objects of a video, each class from 1, and cuts out the best picture of each.

    A number stays while its object is out of sight for up to `LOST_SECONDS`, and ends at a cut.

    Args:
        fps: Of the output.
    """

    def __init__(self, fps: Fraction):
        self._frames_to_confirm = max(2, round(NEW_SECONDS * fps))
        self._frames_to_keep = round(LOST_SECONDS * fps)
        self._alpha = 1 - math.exp(-1 / (SMOOTHING_SECONDS * fps))
        self._beta = self._alpha**2 / (2 - self._alpha)  # Benedict and Bordner, 1962
        self._tracks, self._next_id = np.zeros(0, TRACK), 0
        self._count: Counter[int] = Counter()  # objects of each class
        self._recent: deque[Detections] = deque(maxlen=max(1, round(TRAIL_SECONDS * fps)))  # those with numbers
        self.track_ids: list[list[int]] = []  # on each frame of the last update, those of the detections
        self._best: dict[tuple[int, int], float] = {}  # how well an object was seen, by class and number
        self._cut_out: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # source index and pixels, not yet taken

    def update(self, frames: Sequence[Detections], cuts: Sequence[bool]) -> list[Detections]:
        """The detections on the next frames with their objects' numbers.

        A new number also holds for the object's earlier detections in these frames. `cuts` tells for each frame whether
        a shot begins with it.
        """
        self.track_ids, numbers = [], {}
        for detections, is_cut in zip(frames, cuts, strict=True):
            if is_cut:
                self._tracks = self._tracks[:0]
            self.track_ids.append(self._track(detections))
            numbers.update(self._tracks[["id", "number"]].tolist())
        numbered = [np.array([numbers[track] for track in found], int) for found in self.track_ids]
        return [replace(found, tracker_id=number) for found, number in zip(frames, numbered, strict=True)]

    def _track(self, detections: Detections) -> list[int]:
        """The track of each detection."""
        tracks = self._tracks
        tracks["frames_missed"] += 1
        centres = _centres(tracks["xyxy"])
        moved = (centres + tracks["velocity"]).clip(0, 1)  # an object may leave the picture and return
        tracks["xyxy"] += np.tile(moved - centres, 2)
        tracks["xyxy"] += np.tile(camera_shift(tracks, detections), 2)
        rows, columns = match(expected(tracks), detections)
        is_new = np.ones(len(detections), bool)
        is_new[columns] = False
        new = np.zeros(is_new.sum(), TRACK)
        new["xyxy"], new["class_id"] = detections.xyxy[is_new], detections.class_id[is_new]
        new["id"], new["frames_seen"] = self._next_id + np.arange(len(new)), 1
        self._next_id += len(new)
        ids = np.empty(len(detections), int)
        ids[columns], ids[is_new] = tracks["id"][rows], new["id"]

        tracks[rows] = self._updated(tracks[rows], detections.xyxy[columns])
        for row in rows[(tracks["number"][rows] == 0) & (tracks["frames_seen"][rows] >= self._frames_to_confirm)]:
            self._count[tracks["class_id"][row].item()] += 1
            tracks["number"][row] = self._count[tracks["class_id"][row].item()]
        frames_to_keep = np.where(tracks["number"] > 0, self._frames_to_keep, tracks["frames_seen"] - 1)
        self._tracks = np.concatenate((tracks[tracks["frames_missed"] <= frames_to_keep], new))
        return ids.tolist()

    def _updated(self, tracks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Corrects the predictions by shares of their errors: those of a straight line through all boxes so far, but
        not less than the filter's constant ones."""
        n = tracks["frames_seen"] = tracks["frames_seen"] + 1
        alpha = np.maximum(self._alpha, 2 * (2 * n - 1) / (n * (n + 1)))
        beta = np.maximum(self._beta, 6 / (n * (n + 1))) / tracks["frames_missed"]
        errors = boxes - tracks["xyxy"]
        tracks["xyxy"] += alpha[:, None] * errors
        tracks["velocity"] += beta[:, None] * (errors[:, :2] + errors[:, 2:]) / 2
        tracks["frames_missed"] = 0
        return tracks

    def next_trails(self, detections: Detections) -> list[np.ndarray]:
        """For each detection on the next frame, its object's centres on the frames before: (K, 2), oldest first,
        relative to the frame, from the last `TRAIL_SECONDS`. To be called once per frame, in order."""
        recent = Detections.merge(self._recent)
        self._recent.append(detections[detections.tracker_id > 0])
        centres = _centres(recent.xyxy)
        objects = zip(detections.class_id, detections.tracker_id, strict=True)
        return [centres[(recent.class_id == label) & (recent.tracker_id == number)] for label, number in objects]

    def look(self, frames: Iterable[tuple[int, np.ndarray, Detections]]) -> None:
        """Cuts out each object that is seen better than ever before.

        Args:
            frames: Source index, image (uint8, (height, width, 3), BGR, with nothing drawn into it) and detections with
                their numbers, of some of the next frames.
        """
        better = {}
        for source_index, image, found in frames:
            objects = zip(found.class_id.tolist(), found.tracker_id.tolist(), strict=True)
            for key, quality, box in zip(objects, visibility(found).tolist(), found.xyxy, strict=True):
                if quality > self._best.get(key, 0):
                    self._best[key], better[key] = quality, (source_index, image, box)
        for key, (source_index, image, box) in better.items():
            self._cut_out[key] = source_index, cut_out(image, box)

    def take_pictures(self, folder: str | None) -> list[Picture]:
        """Writes those that were cut out since the last call into `folder`, by default the system's temporary one."""
        pictures = [
            Picture(*key, source_index, save_picture(image, folder))
            for key, (source_index, image) in self._cut_out.items()
        ]
        self._cut_out.clear()
        objects = self._tracks[["class_id", "number"]].tolist()  # others do not come back
        self._best = {key: self._best[key] for key in objects if key in self._best}
        return pictures


def visibility(detections: Detections) -> np.ndarray:
    """How well each object is seen (N,): large, surely, whole, and not behind another one. 0 if it has no number."""
    boxes = detections.xyxy.clip(0, 1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    common = np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - np.maximum(boxes[:, None, :2], boxes[:, :2])
    common = common.clip(0).prod(axis=-1)
    np.fill_diagonal(common, 0)
    covered = common.max(axis=1, initial=0) / np.maximum(areas, 1e-9)
    is_whole = (boxes[:, :2] > EDGE).all(axis=1) & (boxes[:, 2:] < 1 - EDGE).all(axis=1)
    share = np.where(is_whole, 1, 0.1) * (1 - 0.8 * covered)
    return (detections.tracker_id > 0) * detections.confidence**2 * np.sqrt(areas) * share


def cut_out(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """A copy of the part of an image in a box (4,), relative to it, with a margin."""
    size = image.shape[1::-1]
    corners = box.reshape(2, 2) * size
    margin = PICTURE_MARGIN * (corners[1] - corners[0]).max()
    left, top = np.floor(corners[0] - margin).clip(0, size).astype(int)
    right, bottom = np.ceil(corners[1] + margin).clip(0, size).astype(int)
    return image[top:bottom, left:right].copy()


def save_picture(image: np.ndarray, folder: str | None) -> str:
    """Writes an image as a JPEG file, smaller if need be, and returns its path."""
    scale = min(1, PICTURE_SIDE / max(image.shape))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for quality in (85, 60, 30, 10):  # noise needs the last one
        jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(jpeg) <= PICTURE_BYTES:
            break
    handle, path = tempfile.mkstemp(".jpg", "object-", folder)
    with os.fdopen(handle, "wb") as file:
        file.write(jpeg)
    return path


def expected(tracks: np.ndarray) -> Detections:
    """What the tracks lead one to expect. Those without a number count less."""
    return Detections(tracks["xyxy"], np.where(tracks["number"] > 0, 1, NEW_WEIGHT), tracks["class_id"])


def camera_shift(tracks: np.ndarray, detections: Detections) -> np.ndarray:
    """How far the picture has moved beyond the tracks' predictions: (2,), relative to the frame.

    Of the objects that have been seen for longest, a few propose the shifts that would bring them onto a box. The best
    one counts if it makes the objects twice as like their nearest boxes. A mistaken one swaps numbers, and a small one
    is not needed.
    """
    still = np.zeros((1, 2))
    tracks = tracks[tracks["frames_missed"] == 1]  # those that were seen on the frame before
    seen = expected(tracks[np.argsort(-tracks["frames_seen"], kind="stable")[:SHIFT_VOTERS]])
    if min(len(seen), len(detections)) < 3:
        return still[0]
    needed = 2 * likeness(seen, detections).max(axis=1).mean()
    if needed > 1:  # saves time
        return still[0]
    offsets = _centres(detections.xyxy) - _centres(seen.xyxy)[:, None]
    fits = likeness(seen, detections, offsets) > math.exp(-1)  # in class and size: each is moved onto each
    shifts = np.concatenate((still, offsets[:SHIFT_PROPOSERS][fits[:SHIFT_PROPOSERS]]))
    alike = likeness(seen, detections, shifts[:, None, None])
    best = alike.max(axis=2).mean(axis=1).argmax()
    nearest, votes = alike[best].argmax(axis=1), alike[best].max(axis=1)
    agree = votes > 0.1
    if votes.mean() < needed or agree.sum() < 3:
        return still[0]
    return np.median(offsets[np.arange(len(seen)), nearest][agree], axis=0)


def match(some: Detections, others: Detections) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of N and M detections that are most alike in total, the confident ones first: their indices."""
    alike = likeness(some, others) * some.confidence[:, None]
    alike[alike < MIN_LIKENESS] = 0
    alike *= others.confidence
    rows, columns = linear_sum_assignment(alike, maximize=True)
    is_pair = alike[rows, columns] > 0
    return rows[is_pair], columns[is_pair]


def likeness(some: Detections, others: Detections, shifts: np.ndarray | int = 0) -> np.ndarray:
    """How alike N and M boxes are, after each of K shifts (K, 1, 1, 2) of the first ones: (N, M) or (K, N, M).

    1 is equal, other classes have 0. It falls by a factor of e for each `NEAR` of distance in box sizes, and as the
    ratios of the widths and of the heights. Sums of likenesses prefer a good pair and a bad one to two middling ones;
    to sums of distances they are the same.
    """
    sizes, other_sizes = (np.maximum(found.xyxy[:, 2:] - found.xyxy[:, :2], 1e-6) for found in (some, others))
    offsets = _centres(others.xyxy) - _centres(some.xyxy)[:, None]
    distances = np.linalg.norm((offsets - shifts) / ((sizes[:, None] + other_sizes) / 2), axis=-1)
    growth = np.abs(np.log(sizes[:, None] / other_sizes)).sum(axis=-1)
    return np.exp(-distances / NEAR - growth) * (some.class_id[:, None] == others.class_id)


def _centres(xyxy: np.ndarray) -> np.ndarray:
    """(N, 2) of boxes (N, 4)."""
    return (xyxy[:, :2] + xyxy[:, 2:]) / 2


# ---------------------------------------------------------------------------------------------------------- lines


class Crossing(NamedTuple):
    """An object has crossed a line."""

    source_index: int  # of the first frame on which it was beyond
    line: int  # from 0
    is_in: bool  # the direction: to the right of the way from the line's first point to its second one
    class_id: int
    number: int  # of the object in its class


@dataclass(eq=False, slots=True)
class Path:
    """How an object goes past a line."""

    is_in: bool  # the side on which it was last clear of the line; at first, where it was first seen
    distance: float  # from the line when it was last seen, negative on the "out" side
    along: float  # where on the line that was: 0 at its first point, 1 at the second one
    crossed_on: int | None = None  # the frame of the last change of sides; None if that was beyond the line's ends

    def move(self, distance: float, along: float, frame: int) -> None:
        if (distance > 0) != (self.distance > 0):
            met = self.along + (along - self.along) * self.distance / (self.distance - distance)
            self.crossed_on = frame if 0 <= met <= 1 else None
        self.distance, self.along = distance, along

    def settle(self, margin: float) -> bool:
        """Whether the object has just crossed: it is clear of the line, and was so on the other side before."""
        is_in = self.distance > 0
        if abs(self.distance) <= margin or is_in == self.is_in:
            return False
        self.is_in = is_in
        return self.crossed_on is not None


class LineCounter:
    """Counts the objects that cross lines, in each direction.

    Of each object, one point counts, which is on the ground if the object is: the centre of the box's bottom edge.
    Where it was out of sight, it went straight. It has crossed when it is clear of the line on the other side, by
    `LINE_MARGIN`, so nobody counts who sways on the line.

    Args:
        lines: L of them: x1, y1, x2, y2, relative to the frame (0 to 1). No line is a point.
        fps: Of the output.
    """

    def __init__(self, lines: Sequence[Sequence[float]], fps: Fraction):
        self._lines = np.array(lines, float).reshape(-1, 2, 2)
        self._frames_to_keep, self._frames_lit = round(LOST_SECONDS * fps), max(1, round(LIT_SECONDS * fps))
        self._paths: dict[int, list[Path]] = {}  # past each line, by track
        self._last_seen: dict[int, int] = {}  # by track
        self._frame = 0
        self._last_crossed = np.full(len(lines), -math.inf)
        self.counts = np.zeros((len(lines), 2), int)  # of each line: in, out

    @property
    def is_lit(self) -> np.ndarray:
        """Whether each line was crossed in the last `LIT_SECONDS`: bool (L,)."""
        return self._frame - self._last_crossed < self._frames_lit

    def update(
        self, detections: Detections, track_ids: Sequence[int], source_index: int, aspect_ratio: float
    ) -> list[Crossing]:
        """The crossings that are certain with the next frame. What has no number yet counts when it has one.

        Args:
            detections: With their numbers.
            track_ids: As `ObjectTracker.track_ids` on this frame. As tracks end at a cut, nobody crosses there.
            source_index: Number of the frame in the source.
            aspect_ratio: Of the frame, width by height.
        """
        if not len(self._lines):  # saves time
            return []
        self._frame += 1
        for track in [id for id, seen in self._last_seen.items() if self._frame - seen > self._frames_to_keep + 1]:
            del self._paths[track], self._last_seen[track]
        crossings = []
        distances, along, margins = self._places(detections.xyxy, aspect_ratio)
        for index, track in enumerate(track_ids):
            places = list(zip(distances[index], along[index], strict=True))
            paths = self._paths.setdefault(track, [Path(place[0] > 0, *place) for place in places])
            self._last_seen[track] = self._frame
            number, class_id = detections.tracker_id[index].item(), detections.class_id[index].item()
            for line, (path, place) in enumerate(zip(paths, places, strict=True)):
                path.move(*place, source_index)
                if number and path.settle(margins[index][line]):
                    crossings.append(Crossing(path.crossed_on, line, path.is_in, class_id, number))
                    self.counts[line, 0 if path.is_in else 1] += 1
                    self._last_crossed[line] = self._frame
        return crossings

    def _places(self, xyxy: np.ndarray, aspect_ratio: float) -> tuple[list, list, list]:
        """Of boxes (N, 4): the distances from the lines, the places along them, and the margins: (N, L).

        Distances are relative to the frame's height.
        """
        square = np.array([aspect_ratio, 1])
        starts, ends = self._lines.swapaxes(0, 1) * square
        ways = ends - starts
        lengths = np.linalg.norm(ways, axis=1)
        anchors = np.column_stack((xyxy[:, [0, 2]].mean(axis=1), xyxy[:, 3])) * square
        x, y = np.moveaxis(anchors[:, None] - starts, -1, 0)
        distances = (y * ways[:, 0] - x * ways[:, 1]) / lengths
        along = (x * ways[:, 0] + y * ways[:, 1]) / lengths**2
        sizes = ((xyxy[:, 2:] - xyxy[:, :2]) * square) @ abs(ways[:, ::-1] / lengths[:, None]).T
        return distances.tolist(), along.tolist(), (LINE_MARGIN * sizes).tolist()


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
