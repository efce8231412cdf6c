"""Moving objects that are all known, for the tests of tracking and of filled gaps: rendered shapes, and people and cars
that are only boxes, as a detector would find them.

An object keeps its number in one shot while it is out of sight for at most a second. Whoever is away longer, or comes
after a cut, is a new object.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import shapes

from tracking import Detections

WIDTH, HEIGHT, FPS, SECONDS = 480, 270, 12, 8
KINDS = ("bounces", "crossings", "occlusions", "visits", "cut", "ordinary")
FASTEST = WIDTH / 3  # pixels a second: ordinary speeds end here
LONGEST_GAP_SECONDS = 1.0
POST = np.array([(225, -1), (255, -1), (255, HEIGHT + 1), (225, HEIGHT + 1)], np.float32)  # hides what passes behind it


class SceneFrame(NamedTuple):
    """One output frame and what is to be seen in it."""

    image: np.ndarray  # uint8 (height, width, 3), BGR
    truth: Detections  # an object has the same number in the whole shot, and no other object of the video has it
    shot: int  # from 0


class Shape(NamedTuple):
    """A shape that moves; later ones cover earlier ones."""

    kind: str
    size_px: float
    colour: np.ndarray
    pose: Callable[[float], shapes.Pose]  # of the time in seconds

    def outline(self, seconds: float) -> np.ndarray:
        x, y, angle = self.pose(seconds)
        return shapes.outline(self.kind, (x, y), self.size_px, angle)


def render(kind: str, seed: int, fps: float = FPS, seconds: float = SECONDS) -> list[SceneFrame]:
    """A video of one of `KINDS` with three to six shapes; the same for the same seed."""
    rng = np.random.default_rng((seed, KINDS.index(kind)))
    shots = [new_shot(rng, kind) for _ in range(2 if kind == "cut" else 1)]
    frames, number_of = [], Numbers()
    for time in np.arange(round(seconds * fps)) / fps:
        shot = int(time / seconds * len(shots))
        backdrop, cast = shots[shot]
        image, outlines = backdrop(time, WIDTH, HEIGHT), [shape.outline(time) for shape in cast]
        for shape, corners in zip(cast, outlines, strict=True):
            shapes.paint(image, corners, shape.colour)
        if kind == "occlusions":
            shapes.paint(image, POST, np.array([90, 90, 90]))
            outlines.append(POST)
        shares, rows = shapes.visible_shares(outlines, WIDTH, HEIGHT), []
        for index, shape in enumerate(cast):
            if shares[index] >= shapes.MIN_VISIBLE:
                box = shapes.clipped_box(outlines[index], WIDTH, HEIGHT) / (WIDTH, HEIGHT, WIDTH, HEIGHT)
                rows.append((*box, shapes.LABELS.index(shape.kind), number_of((shot, index), time)))
        jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1]  # scores flicker, as in life
        frames.append(SceneFrame(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), certain(rows), shot))
    return frames


class Numbers:
    """Numbers objects that are seen, each from the time after which it has been away for too long as another one."""

    def __init__(self):
        self._numbers, self._last_seen, self._new = {}, {}, itertools.count(1)

    def __call__(self, thing: object, time: float) -> int:
        if time - self._last_seen.get(thing, -math.inf) > LONGEST_GAP_SECONDS:
            self._numbers[thing] = next(self._new)
        self._last_seen[thing] = time
        return self._numbers[thing]


def certain(rows: np.ndarray | list[tuple[float, ...]]) -> Detections:
    """Detections from rows of a box (xyxy), a class and a number, with full confidence."""
    columns = np.array(rows).reshape(-1, 6)
    class_id, number = columns[:, 4:].T.astype(int)
    return Detections(columns[:, :4].astype(np.float32), np.ones(len(columns), np.float32), class_id, number)


def new_shot(rng: np.random.Generator, kind: str) -> tuple[Callable[[float], np.ndarray], list[Shape]]:
    """What is behind, RGB by the time in seconds, and the shapes in front of it.

    "ordinary" looks like the example videos; the others are harder: any background, and two of each kind of shape.
    """
    if kind == "ordinary":
        backdrop = (shapes.night, shapes.awnings)[rng.integers(2)]
        colours = rng.permutation([shapes.CORAL, shapes.AMBER, shapes.MINT, shapes.SKY, shapes.LILAC, shapes.CREAM])
        names = rng.permutation(shapes.LABELS)[: rng.integers(3, 5)]
    else:
        still = shapes.background(rng, WIDTH, HEIGHT)
        names = rng.choice(shapes.LABELS, rng.integers(2, 4), replace=False).repeat(2)
        colours = [shapes.contrasting_colour(rng, still) for _ in names]
        backdrop = lambda *_: still.copy()  # noqa: E731
    cast = []
    for index, (name, colour) in enumerate(zip(names, colours, strict=False)):
        size = rng.uniform(0.18, 0.36) * HEIGHT
        cast.append(Shape(name, size, colour, path(rng, kind, name, size, index)))
    return backdrop, cast


def path(rng: np.random.Generator, kind: str, name: str, size: float, index: int) -> Callable[[float], shapes.Pose]:
    """Straight on, and back at the walls: those of the picture, or of a room that is wider ("visits"). Some circle.

    In "crossings", shapes of the same kind meet: one comes from the left, one from the right, on nearly the same line.
    """
    x, y, angle = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(0, math.pi)
    slowest = 0.5 if kind == "occlusions" else 0.2  # so that an occlusion is short
    speed, way = rng.uniform(slowest, 1) * FASTEST, rng.uniform(0, 2 * math.pi)
    if kind in ("crossings", "occlusions"):
        way = rng.uniform(-0.3, 0.3) + math.pi * (index % 2)
    if kind == "crossings":
        x, y = (0, WIDTH)[index % 2], HEIGHT * (0.25 + 0.25 * (index // 2) + rng.uniform(-0.08, 0.08))
    velocity = speed * math.cos(way), speed * math.sin(way), rng.uniform(-1.5, 1.5)
    if kind == "ordinary" and index % 2:
        radius, spin = 0.28 * HEIGHT, rng.uniform(-0.2, 0.2)
        centre = rng.uniform(0.25, 0.75) * WIDTH, HEIGHT / 2
        return shapes.circle(centre, (radius, radius), rng.uniform(), speed / (2 * math.pi * radius), spin)[0]
    margin = rng.choice((0.25, 1.0)) * size + size if kind == "visits" else 0
    room = (WIDTH + 2 * margin, HEIGHT)
    pose = shapes.bounce(name, size, (x + margin, y, angle), velocity, room)[0]
    return lambda seconds: (pose(seconds)[0] - margin, *pose(seconds)[1:])


CAMERAS = ("still", "shakes", "shakes and pans", "drives")


def people(
    camera: str, seed: int, fps: float = 15, seconds: float = 12, missing: float = 0.1, doubles: float = 0.0
) -> tuple[list[Detections], list[Detections]]:
    """Simulated detections of people who walk to the left and to the right, and the truth, on each frame.

    Boxes are tall and jitter by 3 % of their size. Who is covered for the most part by someone nearer is not found.
    The still camera is close to few people, the others see more and smaller ones.

    Args:
        camera: One of `CAMERAS`. A hand shakes by up to 3 % of the width, up and down as well, each frame anew. A pan
            goes half a width a second. Who drives sees everything grow by a third and shrink, and shakes by 1 %.
        missing: Share of the detections that are missing.
        doubles: Share of the detections that have a second, weak box.
    """
    rng = np.random.default_rng((seed, CAMERAS.index(camera)))
    times = np.arange(round(seconds * fps)) / fps
    shake = {"still": 0, "drives": 0.01}.get(camera, 0.03) * rng.uniform(-1, 1, (len(times), 2)) * (1, 16 / 9)
    pan = 0.5 * times * (camera == "shakes and pans")
    zoom = 1 + (camera == "drives") * np.sin(2 * np.pi * times / 5) / 3
    width = 1 + pan[-1]  # of the world, in frames
    count = round(seconds / 2) if camera == "still" else round(8 * width + seconds / 2)
    heights = rng.uniform(0.35, 0.6, count) if camera == "still" else rng.uniform(0.12, 0.3, count)
    widths = heights * rng.uniform(0.3, 0.45, count) * 9 / 16
    feet = 0.4 + 0.6 * heights + rng.uniform(-0.05, 0.05, count) * (1 if camera == "still" else 6)
    speeds = rng.uniform(0.06, 0.15, count) * rng.choice([-1, 1], count)
    starts = rng.uniform(-0.2, width + 0.2, count) - speeds * rng.uniform(0, seconds, count) * (width == 1)
    found, truth, number_of = [], [], Numbers()
    for time, shaken, panned, zoomed in zip(times, shake, pan, zoom, strict=True):
        x, y = starts + speeds * time - panned + shaken[0], feet + shaken[1]
        boxes = np.column_stack((x - widths / 2, y - heights, x + widths / 2, y))
        clipped = ((boxes - 0.5) * zoomed + 0.5).clip(0, 1)
        seen = np.flatnonzero(areas(clipped) > 0.3 * zoomed**2 * areas(boxes))
        seen = seen[np.argsort(-feet[seen])]  # nearest first
        clipped = clipped[seen]
        numbers = [number_of(person, time) for person in seen]
        truth.append(certain(np.column_stack((clipped, np.zeros(len(seen)), numbers))))
        hidden = [covered_share(box, clipped[:index]) > 0.6 for index, box in enumerate(clipped)]
        is_found = ~np.array(hidden, bool) & (rng.random(len(seen)) >= missing)
        is_doubled = is_found & (rng.random(len(seen)) < doubles)
        boxes, sizes = clipped[is_found], (clipped[:, 2:] - clipped[:, :2])
        boxes = boxes + rng.normal(0, 0.03, boxes.shape) * np.tile(sizes[is_found], 2)
        second = clipped[is_doubled] + rng.normal(0, 0.1, (is_doubled.sum(), 4)) * np.tile(sizes[is_doubled], 2)
        scores = np.concatenate((rng.uniform(0.5, 1, len(boxes)), rng.uniform(0.3, 0.5, len(second))))
        boxes, order = np.concatenate((boxes, second)), np.argsort(-scores)
        found.append(Detections(boxes[order].astype(np.float32), scores[order].astype(np.float32), order * 0))
    return found, truth


WAYS = ("across", "hidden", "to and fro", "sways", "sways and goes on", "sways and returns", "along", "beside")
ASPECT_RATIO = 16 / 9


class TrueCrossing(NamedTuple):
    seconds: float
    is_in: bool
    class_id: int


def passers(
    seed: int, fps: float, ways: Sequence[str] = WAYS, count: int = 4, seconds: float = 12, missing: float = 0.1
) -> tuple[list[Detections], np.ndarray, list[TrueCrossing]]:
    """Simulated detections of people (class 0) and cars (1) around a line, on each frame, the line, and who crosses it.

    Boxes jitter by 3 % of their size, and a tenth is missing. Who is covered for the most part by someone nearer is not
    found. Speeds are 0.3 to 3 box sizes per second, or 1 after swaying, by 0.12 of the box size. "hidden" is out of
    sight for up to a second while crossing. The line has any direction.
    """
    rng = np.random.default_rng((seed, count))
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.33, 0.45)
    way = np.array([math.cos(angle), math.sin(angle)])
    normal = np.array([-way[1], way[0]])  # to the right of the way
    start = np.array([ASPECT_RATIO / 2, 0.55]) + rng.uniform(-0.03, 0.03, 2) - way * length / 2
    times = np.arange(round(seconds * fps)) / fps
    boxes, is_seen, class_ids, truth = [], [], [], []
    for index in range(count):
        class_id = int(rng.integers(2))
        heights, shapes_of_boxes = (((0.12, 0.3), (0.3, 0.45)), ((0.08, 0.18), (1.3, 2)))[class_id]
        height = rng.uniform(*heights)
        size = np.array([height * rng.uniform(*shapes_of_boxes), height])
        extent, direction = abs(normal) @ size, rng.choice([-1, 1])
        since = times - rng.uniform(3, seconds - 5)  # seconds since the crossing
        kind = ways[rng.integers(len(ways))]
        fastest = 1 if kind.startswith("sways") else 3
        speed = math.exp(rng.uniform(math.log(0.3), math.log(fastest))) / np.linalg.norm(normal / size)
        sway = 0.12 * extent * np.sin(2 * math.pi * since / rng.uniform(0.7, 2))
        distance, gap = speed * since, 0.0
        along = np.full(len(times), (index + rng.uniform(0.25, 0.75)) / count * length)
        if kind == "hidden":
            gap = rng.uniform(0.4, 1)
        elif kind == "to and fro":
            frequency = rng.uniform(0.15, 0.3)
            distance = 0.6 * extent * np.sin(2 * math.pi * (frequency * since).clip(-0.25, 0.75))
        elif kind == "sways":
            distance = sway
        elif kind == "sways and goes on":
            distance = np.sign(distance) * (abs(distance) - 2 * speed).clip(0) + sway
        elif kind == "sways and returns":
            distance = (abs(since) - 2).clip(0) * speed + sway
        elif kind == "along":
            distance, along = rng.choice([0, rng.uniform(0.5, 1)]) * extent + 0 * times, length * (0.5 + since / 8)
        elif kind == "beside":
            along = np.full(len(times), rng.choice([-0.15, length + 0.15]))
        if kind in ("across", "hidden", "to and fro", "sways and goes on"):
            changes = np.flatnonzero(np.diff(distance > 0)) + 1
            changes = changes[-1:] if kind == "sways and goes on" else changes
            truth += [TrueCrossing(times[at], bool((distance[at] > 0) == (direction > 0)), class_id) for at in changes]
        feet = start + np.outer(along, way) + np.outer(direction * distance, normal)
        full = np.column_stack((feet - size * (0.5, 1), feet + size * (0.5, 0))) / (ASPECT_RATIO, 1, ASPECT_RATIO, 1)
        boxes.append(full.clip(0, 1))
        is_inside = (areas(full.clip(0, 1)) > 0.7 * areas(full)) & (full[:, 3] < 1)
        is_seen.append(is_inside & (abs(since) >= gap / 2) & (rng.random(len(times)) >= missing))
        class_ids.append(class_id)
    found = [
        detect(rng, [(boxes[i][frame], class_ids[i]) for i in range(count) if is_seen[i][frame]])
        for frame in range(len(times))
    ]
    line = np.concatenate((start, start + way * length)) / (ASPECT_RATIO, 1, ASPECT_RATIO, 1)
    return found, line, truth


def detect(rng: np.random.Generator, things: list[tuple[np.ndarray, int]]) -> Detections:
    """Noisy detections of boxes and classes, without those that are covered for the most part by a nearer one."""
    nearest = sorted(things, key=lambda thing: -thing[0][3])
    boxes = np.array([box for box, _ in nearest]).reshape(-1, 4)
    is_found = np.array([covered_share(box, boxes[:index]) <= 0.6 for index, box in enumerate(boxes)], bool)
    boxes, class_ids = boxes[is_found], np.array([class_id for _, class_id in nearest], int)[is_found]
    noisy = boxes + rng.normal(0, 0.03, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return Detections(noisy.astype(np.float32), rng.uniform(0.5, 1, len(boxes)).astype(np.float32), class_ids)


def areas(boxes: np.ndarray) -> np.ndarray:
    """(N,), of boxes (N, 4)."""
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)


def covered_share(box: np.ndarray, others: np.ndarray) -> float:
    """The share of a box that the one which covers most of it covers."""
    common = np.concatenate((np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])), axis=1)
    return areas(common).max(initial=0) / areas(box[None])[0]


Detector = Callable[[list[np.ndarray]], list[Detections]]


def render_and_detect(
    detector: Detector, kind: str, seed: int, fps: float = FPS, seconds: float = SECONDS
) -> tuple[list[SceneFrame], list[Detections]]:
    """A video and what a detector finds on each of its frames."""
    frames = render(kind, seed, fps, seconds)
    images = [frame.image for frame in frames]
    batches = (detector(images[start : start + 16]) for start in range(0, len(images), 16))
    return frames, list(itertools.chain.from_iterable(batches))


def overlaps(detections: Detections, truth: Detections) -> np.ndarray:
    """Intersection over union (N, M) of the boxes, 0 between classes."""
    result = np.array([shapes.overlap(box, truth.xyxy) for box in detections.xyxy]).reshape(-1, len(truth))
    return result * (detections.class_id[:, None] == truth.class_id)


def match(detections: Detections, truth: Detections) -> list[tuple[int, int]]:
    """Pairs of indices, one to one, best score first: same class, overlap of 0.5 or more."""
    free, table, pairs = np.ones(len(truth), bool), overlaps(detections, truth), []
    for i in np.argsort(-detections.confidence, kind="stable"):
        if (table[i] * free).max(initial=0) >= 0.5:
            j = int((table[i] * free).argmax())
            free[j] = False
            pairs.append((int(i), j))
    return pairs
