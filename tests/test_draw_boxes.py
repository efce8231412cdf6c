import itertools
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from draw_boxes import LINE_COLORS, PALETTE, draw_bounding_boxes, draw_line_counts, draw_lines, label_color

GREY = 128  # the background of every test frame; no label has this colour
COMMON = ["person", "car", "bicycle", "motorcycle", "bus", "truck", "traffic light", "dog", "cat", "chair"]
SHAPES = ["circle", "square", "triangle", "star", "cross"]


def grey_frame(width=960, height=540):
    return np.full((height, width, 3), GREY, np.uint8)


def draw_one(box, label="person", score=0.87, width=960, height=540, **tracks):
    boxes = np.array([box], dtype=np.float32)
    return draw_bounding_boxes(grey_frame(width, height), boxes, np.array([score]), [label], **tracks)


def bgr(label):
    return tuple(bytes.fromhex(label_color(label)[1:]))[::-1]


def drawn(frame):
    """Where the frame is no longer grey: bool, (height, width)."""
    return (frame != GREY).any(axis=2)


def rows_and_columns(mask):
    """The first and last row, and the first and last column, with a True in them."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1], columns[0], columns[-1]


def tag_picture(label="person", score=0.87, width=960, height=540, **tracks):
    """The tag as it looks above a box that is large enough for it, in the lower half of the frame."""
    middle = height // 4 * 2
    frame = draw_one((width // 4, middle, width, height), label, score, width, height, **tracks)[:middle]
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


def test_the_colour_of_a_label_is_part_of_the_interface_and_the_same_in_every_process():
    assert [label_color(label) for label in ("person", "car", "circle")] == ["#415ffa", "#ff5a00", "#009100"]


@pytest.mark.parametrize("labels", [COMMON, SHAPES, [*SHAPES, "person"]], ids=["common", "shapes", "mixed"])
def test_labels_often_seen_together_have_colours_that_are_easily_told_apart(labels):
    colors = np.array([[bgr(label) for label in labels]], dtype=np.float32) / 255
    lab = cv2.cvtColor(colors, cv2.COLOR_BGR2LAB)[0]
    # A difference of 2.3 is just noticeable, one of 20 plain (CIE 1976).
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 20


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
    frame = draw_one((-50, -np.inf, 2000, 2000))
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
        (660, 340, 960, 540),
        (-100, 200, 80, 300),
        (860, 200, 1100, 300),
        (400, -100, 600, 30),
        (400, 510, 600, 700),
        (400, 5, 600, 300),
        (-1e9, -1e9, 1e9, 1e9),
    ],
)
def test_the_whole_tag_stays_inside_the_frame(box):
    assert len(find(tag_picture(), draw_one(box))) == 1


def test_a_tag_without_room_above_the_box_is_inside_the_box():
    assert find(tag_picture(), draw_one((400, 5, 600, 300))) == [(400, 5)]


def test_the_whole_tag_stays_inside_a_frame_that_is_hardly_higher():
    frame = draw_one((20, 12, 160, 20), width=160, height=20)
    assert find(tag_picture(width=160, height=90), frame) == [(20, 7)]


def test_a_tag_too_wide_for_the_frame_starts_at_its_left_edge():
    label = "a label much too long for a picture as small as this"
    frame = draw_one((60, 40, 160, 90), label, width=160, height=90)
    whole_tag = tag_picture(label, width=400, height=90)
    assert whole_tag.shape[1] > 160
    assert np.array_equal(frame[40 - len(whole_tag) : 40], whole_tag[:, :160])


@pytest.mark.parametrize(
    "track_id, texts", [(3, ["", "3", "person 3", "person 3: 0.87"]), (0, ["", "person", "person: 0.87"])]
)
def test_the_tag_of_a_small_box_gets_shorter_so_that_it_never_covers_more_than_the_box(track_id, texts):
    pictures = []
    for side in range(4, 100):
        above = draw_one((400, 300, 400 + side, 300 + side), track_ids=[track_id])[:300]
        assert drawn(above).sum() <= side**2
        if not pictures or not np.array_equal(above, pictures[-1]):
            pictures.append(above)
    widths = [drawn(picture).any(axis=0).sum() for picture in pictures]
    assert widths == sorted(widths) and widths[0] == 0 and len(widths) == len(texts)
    assert len(find(tag_picture(track_ids=[track_id]), pictures[-1])) == 1
    name = pictures[-2][:, : 400 + widths[-2] - 8]  # without the padding at its end
    assert np.array_equal(name, pictures[-1][:, : name.shape[1]])


def test_a_number_follows_the_name_and_0_is_none(monkeypatch):
    monkeypatch.setattr("draw_boxes.label_color", lambda label: "#ff5a00")
    assert np.array_equal(tag_picture("car", track_ids=[3]), tag_picture("car 3"))
    assert np.array_equal(tag_picture("car", track_ids=[0]), tag_picture("car"))


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


@pytest.mark.parametrize("size", ["160x90", "480x270", "270x480", "960x540", "1080x1920", "3840x2160"])
def test_lines_and_text_have_the_same_size_on_the_screen_at_every_resolution(size):
    width, height = map(int, size.split("x"))
    frame = draw_one((0.2 * width, 0.5 * height, 0.8 * width, 0.9 * height), width=width, height=height)
    line_width = drawn(frame)[round(0.7 * height), : width // 2].sum()
    tag_height = len(tag_picture(width=width, height=height))
    # To the nearest pixel, except where lines or text would be too small to see. The tag is 1.4 times as high as its
    # text, which has 13 pixels in the player: the frame is fitted into 600x448 pixels there.
    assert line_width == pytest.approx(max(2, (width * height) ** 0.5 / 240), abs=1.1)
    assert line_width % 2 == 0
    assert tag_height == pytest.approx(1.4 * max(9, 13 * max(width / 600, height / 448)), abs=1)


@pytest.mark.parametrize("width, height", [(8, 8), (1, 1), (1, 500), (500, 1), (8, 0), (16, 9)])
def test_frames_smaller_than_a_tag_are_drawn_on_without_failing(width, height):
    frame = draw_one((0, 0, 5, 5), width=width, height=height, trails=[np.array([(0.0, 0.0), (3.0, 7.0)])])
    assert frame.shape == (height, width, 3)


# The trail

TRAIL = np.linspace((100, 300), (800, 300), 36)[:-1]  # to the right, to the centre of the box below
AT_ITS_END = (770, 270, 830, 330)


def test_the_trail_widens_to_the_centre_of_the_box():
    frame = draw_one(AT_ITS_END, trails=[TRAIL])
    frame[drawn(draw_one(AT_ITS_END))] = GREY  # all but the trail
    assert rows_and_columns(drawn(frame)) == pytest.approx((300, 300, 100, 800), abs=3)
    quarters = frame[290:311, [180, 360, 530, 700]]
    assert (quarters[10, -1] == bgr("person")).all()
    widths = drawn(quarters).sum(axis=0)
    assert (np.diff(widths) >= 0).all() and widths[0] < 5 < widths[-1]


def test_no_trail_crosses_an_outline_or_a_tag_whichever_score_is_higher():
    boxes = np.array([[100.0, 300, 300, 400], [500.0, 250, 700, 500]])
    trails = [
        np.array([[400.0, 200], [900, 245], [450, 390]]),
        np.array([[10.0, 250], [110, 290], [150, 290], [300, 350]]),
    ]
    arguments = grey_frame(), boxes, np.array([0.9, 0.4]), ["person", "car"]
    plain = draw_bounding_boxes(*arguments).copy()
    with_trails = draw_bounding_boxes(grey_frame(), *arguments[1:], trails=trails)
    changed = (with_trails != plain).any(axis=2)
    assert changed.sum() > 500
    assert not (changed & drawn(plain)).any()


def test_without_numbers_and_earlier_centres_the_picture_is_the_same_as_without_tracks():
    assert np.array_equal(draw_one(AT_ITS_END, track_ids=[0], trails=[np.empty((0, 2))]), draw_one(AT_ITS_END))


@pytest.mark.parametrize("trail", [[(-1e9, 1e9), (1e9, -50)], [(800, 300)] * 9, [(959.9, 539.9), (-0.1, -0.1)]])
def test_a_trail_may_stand_still_or_leave_the_frame(trail):
    assert drawn(draw_one(AT_ITS_END, trails=[np.array(trail)]))[300, 800]


# Several boxes


@pytest.mark.parametrize("scores", [(0.9, 0.3), (0.3, 0.9)])
def test_the_higher_score_is_on_top(scores):
    boxes = np.array([[300.0, 200, 600, 400], [310.0, 202, 610, 400]])  # outlines cross, tags overlap
    labels = ["person", "car"]
    frame = draw_bounding_boxes(grey_frame(), boxes, np.array(scores), labels)
    top = np.argmax(scores)
    alone = draw_one(boxes[top], labels[top], scores[top])
    tag = tag_picture(labels[top], scores[top])
    assert len(find(tag, frame)) == 1
    assert np.array_equal(frame[300:][drawn(alone)[300:]], alone[300:][drawn(alone)[300:]])


@pytest.mark.parametrize("second", [(130, 110, 330, 250), (60, 95, 260, 235), (100, 100, 300, 240)])
def test_a_tag_that_would_hide_another_one_moves_to_another_corner_of_its_box(second):
    boxes = np.array([(100, 100, 300, 240), second], float)
    frame = draw_bounding_boxes(grey_frame(), boxes, np.array([0.9, 0.8]), ["star", "cross"])
    sure, unsure = tag_picture("star", 0.9), tag_picture("cross", 0.8)
    assert find(sure, frame) == [(100, 100 - len(sure))]
    ((left, top),) = find(unsure, frame)
    height, width = unsure.shape[:2]
    assert left in (second[0], second[2] - width)
    assert top in (second[1] - height, second[3])


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
    assert draw_bounding_boxes(frame, np.empty((0, 4)), np.empty(0), [], [], []) is frame
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
        (np.inf, np.inf, np.inf, np.inf),
        (np.inf, 0, -np.inf, 100),
    ],
)
def test_boxes_that_show_nothing_of_the_frame_are_left_out(box):
    assert not drawn(draw_one(box, track_ids=[3], trails=[TRAIL])).any()


def test_a_bad_box_does_not_hide_the_good_ones():
    boxes = np.array([[np.nan] * 4, [200.0, 150, 500, 400]], dtype=np.float32)
    frame = draw_bounding_boxes(grey_frame(), boxes, np.array([0.9, 0.87]), ["car", "person"])
    assert np.array_equal(frame, draw_one((200, 150, 500, 400)))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"frame": np.zeros((540, 960, 4), np.uint8)}, "frame must be"),
        ({"frame": np.zeros((540, 960, 3), np.float32)}, "frame must be"),
        ({"frame": np.zeros((540, 960, 3), np.uint8)[:, ::-1]}, "C-contiguous"),
        ({"frame": np.frombuffer(bytes(30), np.uint8).reshape(2, 5, 3)}, "writeable"),
        ({"boxes": np.zeros(4)}, "boxes must be numbers of shape"),
        ({"boxes": np.zeros((1, 5))}, "boxes must be numbers of shape"),
        ({"scores": np.zeros((1, 1))}, "scores must be 1 numbers"),
        ({"scores": np.zeros(2)}, "scores must be 1 numbers"),
        ({"labels": ["person", "car"]}, "labels must be 1 strings"),
        ({"labels": [0]}, "labels must be 1 strings"),
        ({"track_ids": np.array([1.0])}, "track_ids must be 1 numbers"),
        ({"track_ids": np.array([1, 2])}, "track_ids must be 1 numbers"),
        ({"trails": []}, "trails must be 1 arrays"),
        ({"trails": [np.zeros((5, 3))]}, "trails must be 1 arrays"),
        ({"trails": [np.array([[0, np.nan]])]}, "trails must be 1 arrays"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(changed, message):
    right = {"frame": grey_frame(), "boxes": np.zeros((1, 4)), "scores": np.zeros(1), "labels": ["person"]}
    with pytest.raises(ValueError, match=message):
        draw_bounding_boxes(**(right | changed))


# Lines

LINES = np.array([[100, 100, 400, 130], [700, 450, 640, 80], [60, 520, 500, 536], [940, 60, 955, 400]])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("scale", [0.5, 1, 4])
def test_counts_cover_neither_a_line_nor_each_other(count, scale):
    lines, size = (LINES[:count] * scale).astype(int), (round(960 * scale), round(540 * scale))
    counts = np.array([[0, 0], [12, 9], [123, 45], [7, 1000]])[:count]
    both, only_counts, only_lines = grey_frame(*size), grey_frame(*size), grey_frame(*size)
    draw_lines(both, lines, [False] * count)
    draw_line_counts(both, lines, counts)
    draw_lines(only_lines, lines, [False] * count)
    draw_line_counts(only_counts, lines, counts)
    is_line = drawn(only_lines)
    np.testing.assert_array_equal(both[is_line], only_lines[is_line])
    areas = []
    for line, own in zip(lines, counts, strict=True):
        alone = grey_frame(*size)
        draw_line_counts(alone, line[None], own[None])
        areas.append(drawn(alone).sum())
    assert drawn(only_counts).sum() >= 0.99 * sum(areas)


def test_a_line_has_an_arrow_to_the_right_of_its_way():
    for line, (x, y) in (([300, 270, 600, 270], (0, 1)), ([300, 100, 300, 400], (-1, 0))):
        frame = grey_frame()
        draw_lines(frame, np.array([line]), [False])
        (x1, y1, x2, y2), mask = line, drawn(frame)
        middle = np.array([x1 + x2, y1 + y2]) // 2
        for step, is_arrow in ((20, True), (-20, False)):
            assert mask[tuple((middle + step * np.array([x, y]))[::-1])] == is_arrow


def test_each_line_has_a_colour_that_no_label_has_and_lights_up_when_it_is_crossed():
    assert not {*LINE_COLORS.values()} & {*PALETTE}
    frame, lit = grey_frame(), grey_frame()
    draw_lines(frame, LINES, [False] * 4)
    draw_lines(lit, LINES, [False, True, False, False])
    for (x1, y1, x2, y2), color in zip(LINES, LINE_COLORS.values(), strict=True):
        assert tuple(frame[(y1 + 3 * y2) // 4, (x1 + 3 * x2) // 4]) == tuple(bytes.fromhex(color[1:]))[::-1]
    changed = rows_and_columns((frame != lit).any(axis=2))
    assert changed == pytest.approx((80, 450, 640, 700), abs=12)
    assert drawn(lit).sum() > 1.1 * drawn(frame).sum()


def test_without_lines_nothing_is_drawn():
    frame = grey_frame()
    draw_lines(frame, np.zeros((0, 4)), [])
    draw_line_counts(frame, np.zeros((0, 4)), np.zeros((0, 2), int))
    assert not drawn(frame).any()
