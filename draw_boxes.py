"""Draws detections on a frame: an outline and a `label: score` tag for each box."""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

# Fractions of the frame's size (the square root of its area), so that a video looks the same at
# every resolution: 4 and 15 pixels at 960x540, and never less than 2 and 10. Smaller text cannot be read.
LINE_WIDTH = 0.004
TEXT_SIZE = 0.021
MIN_TEXT_SIZE_PIXELS = 10
TEXT_WEIGHT = 500  # 400 is regular, 700 is bold

# 24 vivid colours, as far from each other as possible: at least 0.14 in OKLab.
PALETTE = [
    "#d70f41", "#6ecdfa", "#ff5a00", "#a59b00", "#00ffeb", "#1ea0ff", "#ff73ff", "#aa5f00",
    "#2da58c", "#1e7daf", "#b49bfa", "#ffbeff", "#ebe100", "#ff919b", "#c319a0", "#ffa500",
    "#415ffa", "#50fa69", "#aa6eaa", "#87cd91", "#009100", "#ff469b", "#0fc319", "#a55aff",
]  # fmt: skip
# Found by search, together with the palette's order: it gives different colours to labels that are
# often seen together (people and traffic, pets, sports, a laid table, simple shapes).
PALETTE_SALT = 583273

BGR = tuple[int, int, int]


@lru_cache(maxsize=1024)
def label_color(label: str) -> str:
    """Returns the colour of a label as `#rrggbb`. It depends on the label alone, so it never changes.

    Example:
        >>> label_color("person")
        '#415ffa'
    """
    digest = hashlib.sha256(f"{label}{PALETTE_SALT}".encode()).hexdigest()
    return PALETTE[int(digest, 16) % len(PALETTE)]


def draw_bounding_boxes(frame: np.ndarray, boxes: np.ndarray, scores: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Draws boxes with their labels and scores into a frame, the highest score on top.

    Only the part of a box inside the frame is outlined; a box that has none, or is empty, inverted
    or not a number, is left out. Tags stay inside the frame.

    Args:
        frame: The picture, changed in place: uint8, (height, width, 3), BGR, C-contiguous.
        boxes: Numbers, (N, 4): left, top, right, bottom (xyxy) in pixels of the frame.
        scores: Numbers from 0 to 1, (N,).
        labels: N class names, in any script that OpenCV's built-in fonts have (Latin, Cyrillic,
            Greek, Chinese, Japanese, Korean and more); other characters become question marks.

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
    _check(frame, boxes, scores, labels)
    height, width = frame.shape[:2]
    scale = math.sqrt(height * width)
    line_width = 2 * math.ceil(scale * LINE_WIDTH / 2)
    text_size = max(MIN_TEXT_SIZE_PIXELS, round(scale * TEXT_SIZE))

    boxes = np.clip(boxes, 0, [width, height, width, height])
    visible = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)  # False for NaN, too
    order = [i for i in np.argsort(scores, kind="stable") if visible[i]]
    # All outlines come before the first tag, so that no line crosses out a text.
    for i in order:
        _draw_outline(frame, boxes[i], _bgr(labels[i]), line_width)
    for i in order:
        _put_tag(frame, boxes[i], _tag(f"{labels[i]}: {scores[i]:.2f}", _bgr(labels[i]), text_size))
    return frame


def load_font() -> None:
    """Loads the font for the calling thread, which takes 30 ms; otherwise the first text in the thread does."""
    cv2.getTextSize((0, 0), "0", (0, 0), cv2.FontFace("sans"), 10, TEXT_WEIGHT)


def _check(frame: np.ndarray, boxes: np.ndarray, scores: np.ndarray, labels: Sequence[str]) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape[2:] != (3,):
        raise ValueError("frame must be a uint8 array of shape (height, width, 3).")
    if not (frame.flags.c_contiguous and frame.flags.writeable):
        raise ValueError("frame must be C-contiguous and writeable, because it is changed in place.")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        raise ValueError(f"boxes must be numbers of shape (N, 4), not {boxes.dtype} of shape {boxes.shape}.")
    if scores.shape != boxes.shape[:1] or scores.dtype.kind not in "fiu":
        raise ValueError(f"scores must be {len(boxes)} numbers, one for each box, not {scores!r}.")
    if len(labels) != len(boxes) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels must be {len(boxes)} strings, one for each box, not {labels!r}.")


def _bgr(label: str) -> BGR:
    red, green, blue = bytes.fromhex(label_color(label)[1:])
    return blue, green, red


def _draw_outline(frame: np.ndarray, box: np.ndarray, color: BGR, line_width: int) -> None:
    """Draws inwards from the box's edge, so that the line shows in full at the frame's edge, too.

    Lines lie on whole pairs of pixels: H.264 stores one colour for each square of four.
    """
    height, width = frame.shape[:2]
    left, top = (2 * int(side // 2) for side in box[:2])
    right, bottom = min(2 * math.ceil(box[2] / 2), width), min(2 * math.ceil(box[3] / 2), height)
    # One-pixel rectangles, because cv2.rectangle rounds the corners of wider ones.
    for inset in range(min(line_width, (right - left + 1) // 2, (bottom - top + 1) // 2)):
        cv2.rectangle(frame, (left + inset, top + inset), (right - 1 - inset, bottom - 1 - inset), color)


@lru_cache(maxsize=256)  # the same few tags come again and again; one of a 4K frame takes 0.1 MB
def _tag(text: str, color: BGR, text_size: int) -> np.ndarray:
    """A line of text on a coloured ground, uint8 (height, width, 3) BGR."""
    text = " ".join(text.split())  # a line break would put text below the tag
    # OpenCV keeps its fonts per thread: a FontFace must not be shared, and making one takes 1 µs.
    font = cv2.FontFace("sans")
    text_width = cv2.getTextSize((0, 0), text, (0, 0), font, text_size, TEXT_WEIGHT)[2]
    padding = round(text_size * 0.35)
    height = round(text_size * 1.4)
    tag = np.full((height, text_width + 2 * padding, 3), color, np.uint8)
    # Capitals and digits are 0.75 text sizes high: this centres them.
    baseline = round((height + 0.75 * text_size) / 2)
    cv2.putText(tag, text, (padding, baseline), _text_color(color), font, text_size, TEXT_WEIGHT)
    return tag


def _put_tag(frame: np.ndarray, box: np.ndarray, tag: np.ndarray) -> None:
    """Puts the tag on the box's upper left corner, or inside it where the frame has no room above."""
    height, width = tag.shape[:2]
    frame_height, frame_width = frame.shape[:2]
    left, top = int(box[0]), int(box[1])
    left = max(0, min(left, frame_width - width))
    top = top - height if top >= height else max(0, min(top, frame_height - height))
    place = frame[top : top + height, left : left + width]
    place[:] = tag[: place.shape[0], : place.shape[1]]  # it may be larger than the whole frame


def _text_color(background: BGR) -> BGR:
    """Black or white, whichever stands out more: by WCAG 2 at least 4.5 to 1 on any background."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
