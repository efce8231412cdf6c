import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from draw_boxes import PALETTE, draw_bounding_boxes, label_color

GREY = 128  # the background of every test frame; no label has this colour
COMMON = ["person", "car", "bicycle", "motorcycle", "bus", "truck", "traffic light", "dog", "cat", "chair"]
SHAPES = ["circle", "square", "triangle", "star", "cross"]
COCO = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,
suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,
tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,
hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,
cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,
toothbrush""".replace("\n", "").split(",")


def grey_frame(width=960, height=540):
    return np.full((height, width, 3), GREY, np.uint8)


def draw_one(box, label="person", score=0.87, width=960, height=540):
    boxes = np.array([box], dtype=np.float32)
    return draw_bounding_boxes(grey_frame(width, height), boxes, np.array([score]), [label])


def bgr(label):
    return tuple(bytes.fromhex(label_color(label)[1:]))[::-1]


def drawn(frame):
    """Where the frame is no longer grey: bool, (height, width)."""
    return (frame != GREY).any(axis=2)


def rows_and_columns(mask):
    """The first and last row, and the first and last column, with a True in them."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1], columns[0], columns[-1]


def tag_picture(label="person", score=0.87, width=960, height=540):
    """The tag as it looks above a tiny box in the middle of the frame, where it has room."""
    middle = height // 2
    frame = draw_one((width // 4, middle, width // 4 + 1, middle + 1), label, score, width, height)[:middle]
    top, bottom, left, right = rows_and_columns(drawn(frame))
    return frame[top : bottom + 1, left : right + 1]


def find(picture, frame):
    """The (left, top) corners of all exact copies of the picture inside the frame."""
    difference = cv2.matchTemplate(frame, picture, cv2.TM_SQDIFF_NORMED)
    height, width = picture.shape[:2]
    rows, columns = np.nonzero(difference < 0.001)
    corners = zip(columns.tolist(), rows.tolist(), strict=True)
    return [(x, y) for x, y in corners if np.array_equal(frame[y : y + height, x : x + width], picture)]


def contrast_ratio(a_bgr, b_bgr):
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(color):
        c = np.array(color) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.0722, 0.7152, 0.2126]

    darker, lighter = sorted([luminance(a_bgr), luminance(b_bgr)])
    return (lighter + 0.05) / (darker + 0.05)


# Colours


def test_a_label_has_the_same_colour_in_every_process():
    command = f"from draw_boxes import label_color; print([label_color(x) for x in {COMMON + SHAPES}])"
    expected = str([label_color(label) for label in COMMON + SHAPES])
    for seed in "12":
        result = subprocess.run(
            [sys.executable, "-c", command],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == expected


def test_the_colour_of_a_label_is_part_of_the_interface_and_does_not_change():
    assert [label_color(label) for label in ("person", "car", "circle")] == ["#415ffa", "#ff5a00", "#009100"]


@pytest.mark.parametrize("labels", [COMMON, SHAPES, [*SHAPES, "person"]], ids=["common", "shapes", "mixed"])
def test_labels_often_seen_together_have_colours_that_are_easily_told_apart(labels):
    colors = np.array([[bgr(label) for label in labels]], dtype=np.float32) / 255
    lab = cv2.cvtColor(colors, cv2.COLOR_BGR2LAB)[0]
    # A difference of 2.3 is just noticeable, one of 20 plain (CIE 1976).
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 20


def test_the_80_coco_names_share_out_the_palette_evenly():
    colors = [label_color(label) for label in COCO]
    assert len(COCO) == 80
    assert len(set(colors)) >= 22
    assert max(map(colors.count, colors)) <= 7


@pytest.mark.parametrize("label", ["", "自転車", "Fußgänger", "🚲", "a b\tc", "x" * 1000])
def test_any_label_has_a_colour_of_the_palette(label):
    assert label_color(label) in PALETTE


def test_text_stands_out_on_every_colour_of_the_palette():
    label_of = {label_color(f"label {i}"): f"label {i}" for i in range(500)}
    assert set(label_of) == set(PALETTE)
    for label in label_of.values():
        tag = tag_picture(label, width=1920, height=1080).reshape(-1, 3)
        background = bgr(label)
        assert (tag == background).all(axis=1).mean() > 0.4
        assert max(contrast_ratio(color, background) for color in np.unique(tag, axis=0)) >= 4.5


# The outline


def test_the_outline_is_exactly_at_the_edge_of_the_box():
    frame = draw_one((200, 150, 500, 400))
    expected = grey_frame()
    expected[150:400, 200:500] = bgr("person")
    expected[154:396, 204:496] = GREY
    assert np.array_equal(frame[150:], expected[150:])


def test_the_outline_covers_every_pixel_that_the_box_touches():
    frame = draw_one((200.9, 150.9, 499.1, 399.1))
    assert rows_and_columns(drawn(frame)[150:, :]) == (0, 249, 200, 499)


def test_a_box_that_leaves_the_frame_is_outlined_along_the_edge_of_the_frame():
    frame = draw_one((-50, -50, 2000, 2000))
    assert np.array_equal(frame, draw_one((0, 0, 960, 540)))
    assert (frame[-3:] == bgr("person")).all()
    assert (frame[:, -3:] == bgr("person")).all()


@pytest.mark.parametrize("size", [0.2, 1, 2, 3, 5])
def test_a_tiny_box_is_marked_and_its_outline_does_not_spill_over(size):
    frame = draw_one((400, 300, 400 + size, 300 + size), width=3840, height=2160)
    below_the_tag = drawn(frame)[300:]
    side = 2 * np.ceil(size / 2)
    assert rows_and_columns(below_the_tag) == (0, side - 1, 400, 400 + side - 1)
    assert below_the_tag.sum() == side**2


@pytest.mark.parametrize("offset", [0, 1])
def test_each_side_keeps_its_colour_in_a_small_video(offset):
    """H.264 keeps one colour for each square of four pixels: thin orange lines on blue once turned lavender."""
    frame = np.full((136, 240, 3), (160, 60, 40), np.uint8)
    box = np.array([[40.0, 40, 180, 110]]) + offset
    draw_bounding_boxes(frame, box, np.array([0.9]), ["cross"])
    outline = (frame == bgr("cross")).all(axis=2)
    outline[:60] = False  # the tag
    shown = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420), cv2.COLOR_YUV2BGR_I420)
    assert np.abs(shown[outline].astype(int) - bgr("cross")).max() < 6
    assert outline.sum() > 400


# The tag


def test_the_tag_sits_flush_on_the_upper_left_corner_of_the_box():
    tag = tag_picture()
    assert find(tag, draw_one((200, 150, 500, 400))) == [(200, 150 - len(tag))]


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 300, 200),
        (660, 0, 960, 200),
        (0, 340, 300, 540),
        (660, 340, 960, 540),
        (-100, 200, 20, 300),
        (940, 200, 1100, 300),
        (400, -100, 600, 5),
        (400, 535, 600, 700),
        (400, 5, 600, 300),
        (-1e9, -1e9, 1e9, 1e9),
        (959, 539, 960, 540),
    ],
)
def test_the_whole_tag_stays_inside_the_frame(box):
    assert len(find(tag_picture(), draw_one(box))) == 1


def test_a_tag_without_room_above_the_box_is_inside_the_box():
    assert find(tag_picture(), draw_one((400, 5, 600, 300))) == [(400, 5)]


def test_the_whole_tag_stays_inside_a_frame_that_is_hardly_higher():
    frame = draw_one((50, 12, 60, 20), width=160, height=20)
    assert find(tag_picture(width=160, height=90), frame) == [(50, 6)]


def test_a_tag_too_wide_for_the_frame_starts_at_its_left_edge():
    label = "a label much too long for a picture as small as this"
    frame = draw_one((60, 40, 90, 60), label, width=160, height=90)
    whole_tag = tag_picture(label, width=1000, height=90)
    assert whole_tag.shape[1] > 160
    assert np.array_equal(frame[40 - len(whole_tag) : 40], whole_tag[:, :160])


def test_the_tag_shows_the_score_with_two_decimals():
    assert np.array_equal(tag_picture(score=0.871), tag_picture(score=0.869))
    assert not np.array_equal(tag_picture(score=0.87), tag_picture(score=0.86))


@pytest.mark.parametrize("letter", ["自", "자", "Я", "λ", "ß", "é"])
def test_letters_of_other_scripts_are_drawn_not_replaced_by_a_question_mark(letter, monkeypatch):
    monkeypatch.setattr("draw_boxes.label_color", lambda label: "#ff5a00")
    question_mark = tag_picture("?")
    assert np.array_equal(tag_picture("\U0010ffff"), question_mark)  # what is not in the fonts
    assert not np.array_equal(tag_picture(letter), question_mark)


def test_a_line_break_in_a_label_is_drawn_as_a_space(monkeypatch):
    monkeypatch.setattr("draw_boxes.label_color", lambda label: "#ff5a00")
    assert np.array_equal(tag_picture("hot\ndog"), tag_picture("hot dog"))


# Sizes


@pytest.mark.parametrize("size", ["160x90", "480x270", "270x480", "960x540", "1920x1080", "3840x2160"])
def test_a_video_looks_the_same_at_every_resolution(size):
    width, height = map(int, size.split("x"))
    frame = draw_one((0.2 * width, 0.5 * height, 0.8 * width, 0.9 * height), width=width, height=height)
    line_width = drawn(frame)[round(0.7 * height), : width // 2].sum()
    tag_height = len(tag_picture(width=width, height=height))
    scale = (width * height) ** 0.5
    # To the nearest pixel, except where lines or text would be too small to see.
    assert line_width == pytest.approx(max(1, scale / 240), abs=1)
    assert tag_height == pytest.approx(max(14, scale / 34), abs=1)


@pytest.mark.parametrize("width, height", [(8, 8), (1, 1), (1, 500), (500, 1), (8, 0), (16, 9)])
def test_frames_smaller_than_a_tag_are_drawn_on_without_failing(width, height):
    frame = draw_one((0, 0, 5, 5), width=width, height=height)
    assert frame.shape == (height, width, 3)


# Several boxes


@pytest.mark.parametrize("scores", [(0.9, 0.3), (0.3, 0.9)])
def test_the_higher_score_is_on_top(scores):
    boxes = np.array([[300.0, 200, 600, 400], [310.0, 202, 610, 400]])  # outlines cross, tags overlap
    labels = ["person", "car"]
    frame = draw_bounding_boxes(grey_frame(), boxes, np.array(scores), labels)
    top, below = np.argsort(scores)[::-1]
    alone = draw_one(boxes[top], labels[top], scores[top])
    tag = tag_picture(labels[top], scores[top])
    assert len(find(tag, frame)) == 1
    assert not find(tag_picture(labels[below], scores[below]), frame)
    assert np.array_equal(frame[300:][drawn(alone)[300:]], alone[300:][drawn(alone)[300:]])


def test_no_outline_crosses_out_a_tag():
    boxes = np.array([[300.0, 200, 600, 400], [330.0, 100, 700, 500]])  # the second cuts the first's tag
    frame = draw_bounding_boxes(grey_frame(), boxes, np.array([0.4, 0.9]), ["person", "car"])
    assert len(find(tag_picture("person", 0.4), frame)) == 1
    assert len(find(tag_picture("car", 0.9), frame)) == 1


def test_frames_drawn_in_several_threads_are_the_same_as_in_one():
    def draw(i):
        return draw_one((50, 150, 200, 250), "a long label " * 5, width=640 + 320 * (i % 5), height=600)

    expected = [draw(i) for i in range(5)]
    with ThreadPoolExecutor(4) as threads:
        for i, frame in enumerate(threads.map(draw, range(200))):
            assert np.array_equal(frame, expected[i % 5])


# What goes in and what comes out


def test_the_frame_is_drawn_into_in_place_and_returned():
    frame = grey_frame()
    returned = draw_bounding_boxes(frame, np.array([[100.0, 100, 200, 200]]), np.array([0.5]), ["person"])
    assert returned is frame
    assert drawn(frame).any()


def test_the_other_arguments_are_left_as_they_are():
    boxes, scores, labels = np.array([[-10.0, 20.5, 2000, 200]]), np.array([0.5]), ["person"]
    draw_bounding_boxes(grey_frame(), boxes, scores, labels)
    assert (boxes.tolist(), scores.tolist(), labels) == ([[-10.0, 20.5, 2000, 200]], [0.5], ["person"])


def test_without_boxes_the_frame_is_untouched():
    frame = grey_frame()
    assert draw_bounding_boxes(frame, np.empty((0, 4)), np.empty(0), []) is frame
    assert not drawn(frame).any()


@pytest.mark.parametrize(
    "box",
    [
        (-300, 100, -10, 200),
        (100, 540, 200, 700),
        (500, 400, 200, 150),
        (200, 400, 500, 150),
        (200, 150, 200, 400),
        (np.nan, 150, 500, 400),
        (np.nan, np.nan, np.nan, np.nan),
        (np.inf, np.inf, np.inf, np.inf),
        (np.inf, 0, -np.inf, 100),
    ],
)
def test_boxes_that_show_nothing_of_the_frame_are_left_out(box):
    assert not drawn(draw_one(box)).any()


def test_an_infinite_box_is_the_whole_frame():
    assert np.array_equal(draw_one((-np.inf, -np.inf, np.inf, np.inf)), draw_one((0, 0, 960, 540)))


def test_a_bad_box_does_not_hide_the_good_ones():
    boxes = np.array([[np.nan] * 4, [200.0, 150, 500, 400]], dtype=np.float32)
    frame = draw_bounding_boxes(grey_frame(), boxes, np.array([0.9, 0.87]), ["car", "person"])
    assert np.array_equal(frame, draw_one((200, 150, 500, 400)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_boxes_may_be_of_any_number_type(dtype):
    boxes = np.array([[200, 150, 500, 400]], dtype)
    frame = draw_bounding_boxes(grey_frame(), boxes, np.array([0.87]), ["person"])
    assert np.array_equal(frame, draw_one((200, 150, 500, 400)))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"frame": np.zeros((540, 960), np.uint8)}, "frame must be a uint8 array of shape"),
        ({"frame": np.zeros((540, 960, 4), np.uint8)}, "frame must be a uint8 array of shape"),
        ({"frame": np.zeros((540, 960, 3), np.float32)}, "frame must be a uint8 array of shape"),
        ({"frame": np.zeros((540, 960, 3), np.uint8)[:, ::-1]}, "frame must be C-contiguous"),
        (
            {"frame": np.frombuffer(bytes(30), np.uint8).reshape(2, 5, 3)},
            "frame must be C-contiguous and writeable",
        ),
        ({"boxes": np.zeros(4)}, "boxes must be numbers of shape"),
        ({"boxes": np.zeros((1, 5))}, "boxes must be numbers of shape"),
        ({"boxes": np.array([["1", "2", "3", "4"]])}, "boxes must be numbers of shape"),
        ({"scores": np.zeros((1, 1))}, "scores must be 1 numbers"),
        ({"scores": np.zeros(2)}, "scores must be 1 numbers"),
        ({"scores": np.array(["0.5"])}, "scores must be 1 numbers"),
        ({"labels": ["person", "car"]}, "labels must be 1 strings"),
        ({"labels": [0]}, "labels must be 1 strings"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(changed, message):
    right = {"frame": grey_frame(), "boxes": np.zeros((1, 4)), "scores": np.zeros(1), "labels": ["person"]}
    with pytest.raises(ValueError, match=message):
        draw_bounding_boxes(**(right | changed))
