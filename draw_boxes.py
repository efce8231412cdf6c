"""Draws on a frame: for each detection an outline, a tag, and the trail of its object; and the lines that count."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import cv2
import numpy as np

LINE_WIDTH = 0.004  # of the square root of the frame's area: 4 pixels at 960x540, and never less than 2
# Tags are read in the page's player, which fits the frame into this box of CSS pixels (on a page 1400 wide).
PLAYER_SIZE = (600, 448)
TEXT_SIZE_IN_PLAYER = 13
MIN_TEXT_SIZE_PIXELS = 9  # of the frame; smaller text cannot be read at any scale
TEXT_WEIGHT = 500  # 400 is regular, 700 is bold

# 24 vivid colours, as far from each other as possible: at least 0.14 in OKLab.
PALETTE = [
    "#d70f41", "#6ecdfa", "#ff5a00", "#a59b00", "#00ffeb", "#1ea0ff", "#ff73ff", "#aa5f00",
    "#2da58c", "#1e7daf", "#b49bfa", "#ffbeff", "#ebe100", "#ff919b", "#c319a0", "#ffa500",
    "#415ffa", "#50fa69", "#aa6eaa", "#87cd91", "#009100", "#ff469b", "#0fc319", "#a55aff",
]  # fmt: skip
# Found by search, with the palette's order: labels often seen together (traffic, pets, a laid table, shapes) differ.
PALETTE_SALT = 583273

# White, magenta, navy and sand: of counting lines, which no label has.
LINE_COLORS = {"A": "#ffffff", "B": "#ee00ee", "C": "#1a2a8a", "D": "#f2d3a2"}

BGR = tuple[int, int, int]
Place = tuple[int, int, int, int]  # left, top, right, bottom, in whole pixels


@lru_cache(maxsize=1024)
def label_color(label: str) -> str:
    """Returns the colour of a label as `#rrggbb`. It depends on the label alone, so it never changes.

    Example:
        >>> label_color("person")
        '#415ffa'
    """
    digest = hashlib.sha256(f"{label}{PALETTE_SALT}".encode()).hexdigest()
    return PALETTE[int(digest, 16) % len(PALETTE)]


def draw_bounding_boxes(
    frame: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    track_ids: np.ndarray | None = None,
    trails: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Draws boxes with their labels and scores into a frame, the highest score on top.

    Only the part of a box inside the frame is outlined; a box that has none, or is empty, inverted or not a number,
    is left out. Tags stay inside the frame. No tag covers more pixels than its box has: on a small box it leaves out
    the score, then shows the object's number alone, or there is none. A tag that would cover that of a higher score
    moves to another corner of its box.

    Args:
        frame: The picture, changed in place: uint8, (height, width, 3), BGR, C-contiguous.
        boxes: Numbers, (N, 4): left, top, right, bottom (xyxy) in pixels of the frame.
        scores: Numbers from 0 to 1, (N,).
        labels: N class names, in any script that OpenCV's built-in fonts have (Latin, Cyrillic, Greek, Chinese,
            Japanese, Korean and more); other characters become question marks.
        track_ids: Integers, (N,): the objects' numbers, as in `car 3: 0.87`; 0 for none, as in `car: 0.87`.
        trails: For each box, the earlier centres of its object, oldest first: finite numbers, (K, 2), x and y in
            pixels of the frame. The trail goes on to the centre of the box; without earlier ones there is none.

    Returns:
        The same frame.

    Raises:
        ValueError: An argument has another type or shape.

    Example:
        >>> frame = np.zeros((540, 960, 3), np.uint8)
        >>> boxes = np.array([[100.0, 80.0, 300.0, 400.0]])
        >>> frame = draw_bounding_boxes(frame, boxes, np.array([0.87]), ["person"])
    """
    boxes, scores = np.asarray(boxes), np.asarray(scores)
    track_ids = np.zeros(len(boxes), int) if track_ids is None else np.asarray(track_ids)
    trails = [()] * len(boxes) if trails is None else trails
    _check(frame, boxes, scores, labels, track_ids, trails)
    height, width = frame.shape[:2]
    line_width, text_size = _sizes(frame)

    boxes = np.clip(boxes, 0, [width, height, width, height])
    visible = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)  # False for NaN, too
    colors = [_bgr(label_color(label)) for label in labels]
    order = [i for i in np.argsort(scores, kind="stable") if visible[i]]
    # All trails come before the first outline, and all outlines before the first tag: no line crosses out a text.
    for i in order:
        if len(trails[i]):
            _draw_trail(frame, np.vstack([trails[i], boxes[i].reshape(2, 2).mean(axis=0)]), colors[i], line_width)
    for i in order:
        _draw_outline(frame, boxes[i], colors[i], line_width)
    tags = []
    for i in order:
        number = f" {track_ids[i]}" if track_ids[i] else ""
        label = " ".join(labels[i].split())  # a line break would put text below the tag
        texts = [f"{label}{number}: {scores[i]:.2f}", f"{label}{number}", number]
        tags.append(_fitting_tag(boxes[i], (_tag(text, colors[i], text_size) for text in texts if text)))
    _put_tags(frame, boxes[order], tags)
    return frame


def _check(frame, boxes, scores, labels, track_ids, trails) -> None:
    if getattr(frame, "dtype", None) != np.uint8 or frame.shape[2:] != (3,) or not frame.flags.carray:
        raise ValueError("frame must be a writeable, C-contiguous uint8 array of shape (height, width, 3).")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        raise ValueError(f"boxes must be numbers of shape (N, 4), not {boxes.dtype} of shape {boxes.shape}.")
    for name, values, kinds in (("scores", scores, "fiu"), ("track_ids", track_ids, "iu")):
        if values.shape != boxes.shape[:1] or (values.size and values.dtype.kind not in kinds):
            raise ValueError(f"{name} must be {len(boxes)} numbers, one for each box, not {values!r}.")
    if len(labels) != len(boxes) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels must be {len(boxes)} strings, one for each box, not {labels!r}.")
    if len(trails) != len(boxes) or not all(np.shape(t)[1:] == (2,) and np.isfinite(t).all() for t in trails if len(t)):
        raise ValueError(f"trails must be {len(boxes)} arrays of finite numbers of shape (K, 2), one for each box.")


def draw_lines(frame: np.ndarray, lines: np.ndarray, is_lit: Sequence[bool]) -> None:
    """Draws counting lines into a frame, each with an arrow at its middle to its "in" side, the right of its way.

    Args:
        frame: As for `draw_bounding_boxes`.
        lines: Numbers, (L, 4), at most four: x1, y1, x2, y2 in pixels of the frame.
        is_lit: Whether each line lights up.
    """
    line_width, text_size = _sizes(frame)
    for (start, end, tip), color, lit in zip(_strokes(lines, text_size), LINE_COLORS.values(), is_lit, strict=False):
        middle = (start + end) // 2
        layers = [(2 * line_width, _text_color(_bgr(color))), (line_width, _bgr(color))]
        if lit:
            layers = [(4 * line_width, _bgr(color)), (line_width, _text_color(_bgr(color)))]
        for width, layer in layers:
            cv2.line(frame, start.tolist(), end.tolist(), layer, width, cv2.LINE_AA)
            cv2.arrowedLine(frame, middle.tolist(), tip.tolist(), layer, width, cv2.LINE_AA, tipLength=0.5)


def draw_line_counts(frame: np.ndarray, lines: np.ndarray, counts: np.ndarray | None = None) -> None:
    """Writes beside each line its letter, and how many objects have crossed it: `A  in 12  out 9`.

    The text covers neither a line nor another text if there is a place for it at the line's middle or ends.

    Args:
        frame, lines: As for `draw_lines`.
        counts: Integers, (L, 2): in, out. Without them, there are only letters.
    """
    line_width, text_size = _sizes(frame)
    strokes = _strokes(lines, text_size)
    segments = [part for start, end, tip in strokes for part in ((start, end), ((start + end) // 2, tip))]
    taken: list[Place] = []
    for index, ((start, end, _), (letter, color)) in enumerate(zip(strokes, LINE_COLORS.items(), strict=False)):
        text = letter if counts is None else f"{letter}  in {counts[index][0]}  out {counts[index][1]}"
        tag = _tag(text, _bgr(color), text_size)
        size = np.array(tag.shape[1::-1])
        normal = _normal(start, end)
        reach = abs(normal) @ size / 2 + 2 * line_width
        places = []
        for share, side in itertools.product((0.5, 0.2, 0.8, 0, 1), (-1, 1)):
            place = _place(frame, tag, *(start + share * (end - start) + side * reach * normal - size / 2))
            rectangle = (*place[:2], *size.tolist())
            hits = sum(cv2.clipLine(rectangle, *map(np.ndarray.tolist, segment))[0] for segment in segments)
            places.append((hits + sum(_common_area(place, other) > 0 for other in taken), place))
        _, place = min(places, key=lambda rated: rated[0])
        taken.append(place)
        _paste(frame, tag, place)


def _strokes(lines: np.ndarray, text_size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each line, the ends and the tip of its arrow: whole pixels (2,)."""
    ends = [(np.array(line[:2]), np.array(line[2:])) for line in np.asarray(lines).round().astype(int)]
    return [(a, b, ((a + b) / 2 + 1.6 * text_size * _normal(a, b)).astype(int)) for a, b in ends]


def _normal(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The direction to the right of the way, (2,), of length 1."""
    x, y = (end - start) / max(1, math.dist(start, end))
    return np.array([-y, x])


def _place(frame: np.ndarray, tag: np.ndarray, left: float, top: float) -> Place:
    """The place of a tag with that corner, moved into the frame; smaller than the tag if the frame is."""
    (height, width), (tag_height, tag_width) = frame.shape[:2], tag.shape[:2]
    left, top = max(0, min(int(left), width - tag_width)), max(0, min(int(top), height - tag_height))
    return left, top, min(left + tag_width, width), min(top + tag_height, height)


def _common_area(some: Place, other: Place) -> int:
    """How many pixels two places have in common."""
    width, height = min(some[2], other[2]) - max(some[0], other[0]), min(some[3], other[3]) - max(some[1], other[1])
    return max(0, width) * max(0, height)


def _paste(frame: np.ndarray, tag: np.ndarray, place: Place) -> None:
    left, top, right, bottom = place
    frame[top:bottom, left:right] = tag[: bottom - top, : right - left]


def _sizes(frame: np.ndarray) -> tuple[int, int]:
    """The width of lines and the size of text, in pixels."""
    height, width = frame.shape[:2]
    line_width = 2 * math.ceil(math.sqrt(height * width) * LINE_WIDTH / 2)
    scale = max(width / PLAYER_SIZE[0], height / PLAYER_SIZE[1])
    return line_width, max(MIN_TEXT_SIZE_PIXELS, round(TEXT_SIZE_IN_PLAYER * scale))


def _bgr(color: str) -> BGR:
    red, green, blue = bytes.fromhex(color[1:])
    return blue, green, red


def _draw_trail(frame: np.ndarray, points: np.ndarray, color: BGR, line_width: int) -> None:
    """Draws a line through the points (K, 2): a pixel wide at its beginning, as wide as an outline at its end."""
    points = np.clip(points, 0, np.subtract(frame.shape[1::-1], 1)).astype(np.int32)
    ends = [(len(points) - 1) * part // line_width for part in range(line_width + 1)]
    for width, (start, end) in enumerate(itertools.pairwise(ends), 1):
        cv2.polylines(frame, [points[start : end + 1]], False, color, width, cv2.LINE_AA)


def _draw_outline(frame: np.ndarray, box: np.ndarray, color: BGR, line_width: int) -> None:
    """Draws inwards from the box's edge, so that the line shows in full at the frame's edge, too."""
    # Lines lie on whole pairs of pixels: H.264 stores one colour for each square of four.
    height, width = frame.shape[:2]
    left, top = (2 * int(side // 2) for side in box[:2])
    right, bottom = min(2 * math.ceil(box[2] / 2), width), min(2 * math.ceil(box[3] / 2), height)
    # One-pixel rectangles, because cv2.rectangle rounds the corners of wider ones.
    for inset in range(min(line_width, (right - left + 1) // 2, (bottom - top + 1) // 2)):
        cv2.rectangle(frame, (left + inset, top + inset), (right - 1 - inset, bottom - 1 - inset), color)


@lru_cache(maxsize=256)  # the same few tags come again and again; one of a 4K frame takes 0.2 MB
def _tag(text: str, color: BGR, text_size: int) -> np.ndarray:
    """A line of text on a coloured ground, uint8 (height, width, 3) BGR."""
    font = cv2.FontFace("sans")  # made in 1 µs; not to be shared, because OpenCV keeps its fonts per thread
    text_width = cv2.getTextSize((0, 0), text, (0, 0), font, text_size, TEXT_WEIGHT)[2]
    padding, height = round(text_size * 0.35), round(text_size * 1.4)
    tag = np.full((height, text_width + 2 * padding, 3), color, np.uint8)
    baseline = round((height + 0.75 * text_size) / 2)  # centres capitals and digits, 0.75 text sizes high
    cv2.putText(tag, text, (padding, baseline), _text_color(color), font, text_size, TEXT_WEIGHT)
    return tag


def _fitting_tag(box: np.ndarray, tags: Iterable[np.ndarray]) -> np.ndarray:
    """The first tag that is no larger than the box, or an empty one."""
    area = np.prod(box[2:] - box[:2])
    return next((tag for tag in tags if tag.shape[0] * tag.shape[1] <= area), np.empty((0, 0, 3), np.uint8))


def _put_tags(frame: np.ndarray, boxes: np.ndarray, tags: Sequence[np.ndarray]) -> None:
    """Draws a tag for each box. The last ones choose their places first, and lie on top."""
    taken: list[Place] = []
    for box, tag in zip(boxes[::-1], tags[::-1], strict=True):
        least = math.inf
        for place in _tag_places(frame, box, tag):
            covered = sum(_common_area(place, other) for other in taken)
            if covered < least:
                least, best = covered, place
            if not covered:  # saves time
                break
        taken.append(best)
    for tag, place in zip(tags, taken[::-1], strict=True):
        _paste(frame, tag, place)


def _tag_places(frame: np.ndarray, box: np.ndarray, tag: np.ndarray) -> Iterator[Place]:
    """Where the tag of a box may be: first on its upper left corner, or inside it without room above."""
    left, top, right, bottom = box
    height, width = tag.shape[:2]
    above = top - height if top >= height else top
    for x, y in ((left, above), (right - width, above), (left, bottom), (right - width, bottom)):
        yield _place(frame, tag, x, y)


def _text_color(background: BGR) -> BGR:
    """Black or white, whichever stands out more: by WCAG 2 at least 4.5 to 1 on any background."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
