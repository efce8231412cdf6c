"""What a run has found: rows, objects, counts over time, and the files to download.

It knows neither the model nor the page. An object counts once it was seen for `COUNTED_SECONDS`; one that flickers up
in a frame does not.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracking import Crossing, Detections
from video import VideoInfo

COUNTED_SECONDS = 1.0  # how long an object must be seen to count
MAX_SIGHTING_MS = 500  # between two sightings, at most this counts as seen
PLOT_POINTS = 200  # of the counts over time, at most

BOX_COLUMNS = ["x1", "y1", "x2", "y2"]
COLUMNS = ["time_seconds", "frame", "label", "track", "score", *BOX_COLUMNS]  # of the CSV file
FORMAT_VERSION = 1  # of the JSON file: higher if a key changes or goes, not if one is added
TABLE_HEADERS = ["Class", "Objects", "Most at once", "First (s)", "Last (s)"]
CROSSING_COLUMNS = ["second", "frame", "line", "direction", "class", "number"]  # of the CSV file
LINE_HEADERS = ["Line", "Class", "In", "Out", "First (s)"]


class FrameDetections(NamedTuple):
    """What was found on one analysed frame."""

    source_index: int  # number of the frame in the source, from 0
    pts_seconds: float  # from the first frame of the source
    source_size: tuple[int, int]  # width and height in pixels, upright
    detections: Detections  # all that the model found, whatever the threshold
    drawn: Detections  # those above the threshold and in the chosen classes, with the numbers of their objects


@dataclass
class SeenObject:
    """What is known of an object. Times are in milliseconds, so that their sums are exact."""

    first_ms: int
    last_ms: int
    seen_ms: int = 0
    counts: bool = False  # it was seen for long enough
    frames: list[tuple[int, int]] = field(default_factory=list)  # index and time, until it counts


@dataclass
class SeenClass:
    """The objects of a class that count."""

    first_ms: int
    last_ms: int = 0
    objects: int = 0
    at_once: Counter[int] = field(default_factory=Counter)  # by frame
    most_at_once: dict[int, int] = field(default_factory=dict)  # by the second of a point in the plot


class Results:
    """The drawn detections of a run so far. To add some costs the same time, however many there are.

    Args:
        info: The video.
        id2label: Names of the classes by `class_id`.
    """

    def __init__(self, info: VideoInfo, id2label: Mapping[int, str]):
        self.info, self._id2label = info, id2label
        self.source_size: tuple[int | None, int | None] = (None, None)  # width and height in pixels, upright
        # A float32 (N, 9) array per frame, by source index: `COLUMNS`, with the class's id as its label.
        self._rows: dict[int, np.ndarray] = {}
        self._seconds_per_point = max(1, math.ceil(info.duration_seconds / PLOT_POINTS))
        # A short video can have objects, too.
        self._enough_ms = 1000 * min(COUNTED_SECONDS, info.duration_seconds / 2)
        self._objects: dict[tuple[int, int], SeenObject] = {}  # by class and number
        self._classes: dict[str, SeenClass] = {}
        self._crossings: list[Crossing] = []

    @property
    def frame_count(self) -> int:
        """How many frames were analysed."""
        return len(self._rows)

    @property
    def detection_count(self) -> int:
        return sum(map(len, self._rows.values()))

    def add(self, frames: Iterable[FrameDetections]) -> None:
        """Adds frames. One that is there already is replaced: two GPU calls may show it."""
        for frame in frames:
            self.source_size = frame.source_size
            drawn = frame.drawn
            time_and_frame = np.broadcast_to((frame.pts_seconds, frame.source_index), (len(drawn), 2))
            width, height = frame.source_size
            boxes = np.clip(drawn.xyxy, 0, 1) * (width, height, width, height)
            columns = (time_and_frame, drawn.class_id, drawn.tracker_id, drawn.confidence, boxes)
            is_there = frame.source_index in self._rows
            self._rows[frame.source_index] = np.column_stack(columns).astype(np.float32)
            if is_there:
                self._objects.clear()
                self._classes.clear()
            for rows in self._rows.values() if is_there else [self._rows[frame.source_index]]:
                self._count(rows)

    def _count(self, rows: np.ndarray) -> None:
        """Adds the objects of a frame to those that were seen before."""
        for seconds, frame, class_id, number in rows[:, :4].tolist():
            if number:
                ms = round(1000 * seconds)
                seen = self._objects.setdefault((int(class_id), int(number)), SeenObject(ms, ms))
                seen.seen_ms += min(ms - seen.last_ms, MAX_SIGHTING_MS)
                seen.last_ms = ms
                seen.frames.append((int(frame), ms))
                if seen.seen_ms >= self._enough_ms:
                    self._add_to_class(self._id2label[int(class_id)], seen)

    def _add_to_class(self, label: str, seen: SeenObject) -> None:
        """Counts an object on the frames on which it has not been counted."""
        group = self._classes.setdefault(label, SeenClass(seen.first_ms))
        group.objects += not seen.counts
        seen.counts = True
        group.first_ms, group.last_ms = min(group.first_ms, seen.first_ms), max(group.last_ms, seen.last_ms)
        for frame, ms in seen.frames:
            group.at_once[frame] += 1
            second = ms // 1000 // self._seconds_per_point * self._seconds_per_point
            group.most_at_once[second] = max(group.most_at_once.get(second, 0), group.at_once[frame])
        seen.frames.clear()

    def detections(self) -> pd.DataFrame:
        """A row per detection, with the columns of the CSV file; boxes in pixels of the source."""
        table = pd.DataFrame(np.concatenate([np.zeros((0, len(COLUMNS))), *self._rows.values()]), columns=COLUMNS)
        table = table.astype({"frame": int, "track": "Int64"}).replace({"track": {0: pd.NA}})
        table["time_seconds"] = self.info.pts_seconds[table["frame"]]  # float32 is too coarse after some hours
        table["label"] = table["label"].map(self._id2label).astype(object)
        return table.round({"time_seconds": 3, "score": 4} | dict.fromkeys(BOX_COLUMNS, 1))

    def objects_per_class(self) -> pd.DataFrame:
        """A row per class with objects that count, with `TABLE_HEADERS`; the most frequent class comes first."""
        rows = [
            (label, seen.objects, max(seen.most_at_once.values()), seen.first_ms / 1000, seen.last_ms / 1000)
            for label, seen in self._classes.items()
        ]
        table = pd.DataFrame(rows, columns=TABLE_HEADERS).round(1)
        return table.sort_values(["Objects", "Class"], ascending=[False, True])

    def counts_over_time(self, end_seconds: float) -> pd.DataFrame:
        """The most objects of each class at once, per second or longer: columns `second`, `class` and `count`.

        Args:
            end_seconds: Time of the last frame that was analysed.
        """
        points = range(0, int(end_seconds) + 1, self._seconds_per_point)
        classes = sorted(self._classes.items())
        rows = [(second, label, seen.most_at_once.get(second, 0)) for label, seen in classes for second in points]
        return pd.DataFrame(rows, columns=["second", "class", "count"])

    def add_crossings(self, crossings: Iterable[Crossing]) -> None:
        self._crossings += crossings

    def crossings(self) -> pd.DataFrame:
        """A row per crossing, by time, with `CROSSING_COLUMNS`. Lines are A to D, directions "in" and "out"."""
        seconds = self.info.pts_seconds
        rows = [
            (seconds[index], index, "ABCD"[line], ("out", "in")[is_in], self._id2label[class_id], number)
            for index, line, is_in, class_id, number in sorted(self._crossings)
        ]
        return pd.DataFrame(rows, columns=CROSSING_COLUMNS).round({"second": 3})

    def crossings_per_line(self) -> pd.DataFrame:
        """A row per line and class that crossed it, with `LINE_HEADERS`."""
        groups = self.crossings().groupby(["line", "class"])
        rows = [
            (*key, (group["direction"] == "in").sum(), (group["direction"] == "out").sum(), group["second"].min())
            for key, group in groups
        ]
        return pd.DataFrame(rows, columns=LINE_HEADERS).round(1)

    def save(self, base: str, settings: Mapping[str, object]) -> dict[str, str]:
        """Writes the detections as CSV and JSON, and with lines the crossings as CSV, as README.md describes them.

        Returns the paths by kind.

        Args:
            base: Path of the files, without a suffix.
            settings: What the JSON file says besides.
        """
        paths = {"csv": f"{base}.csv", "json": f"{base}.json"}
        found = self.detections()
        found.to_csv(paths["csv"], index=False)
        found["box"] = found[BOX_COLUMNS].to_numpy().tolist()
        (width, height), fps = self.source_size, float(self.info.fps)
        video = {"name": Path(self.info.path).name, "width": width, "height": height, "fps": fps}
        video["duration_seconds"] = round(self.info.duration_seconds, 3)
        frames = sorted(self._rows)
        analysed = {"analysed_frame_count": len(frames), "analysed_frames": frames}
        detections = json.loads(found.drop(columns=BOX_COLUMNS).to_json(orient="records"))
        crossings = self.crossings()
        content = {"format_version": FORMAT_VERSION, **settings, "video": video, **analysed, "detections": detections}
        content["crossings"] = json.loads(crossings.to_json(orient="records"))
        Path(paths["json"]).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        if settings.get("lines"):
            paths["crossings"] = f"{base}-crossings.csv"
            crossings.to_csv(paths["crossings"], index=False)
        return paths
