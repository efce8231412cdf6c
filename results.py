"""What a run has found: rows, objects, when they were there, and the files to download.

It knows neither the model nor the page. An object counts once it was seen for `COUNTED_SECONDS`; one that flickers up
in a frame does not.
"""

import bisect
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracking import Crossing, Detections, Picture
from video import VideoInfo

COUNTED_SECONDS = 1.0  # how long an object must be seen to count
MAX_SIGHTING_MS = 500  # between two sightings, at most this counts as seen
MAX_BARS = 30  # in the timeline for one object each; of more, there is one per class
CLASS_BAR_STEPS = 400  # of the duration, in which a class was there or not

BOX_COLUMNS = ["x1", "y1", "x2", "y2"]
COLUMNS = ["time_seconds", "frame", "label", "track", "score", *BOX_COLUMNS]  # of the CSV file
FORMAT_VERSION = 1  # of the JSON file: higher if a key changes or goes, not if one is added
OBJECT_COLUMNS = ["label", "track", "first_seconds", "last_seconds", "seen_seconds", "best_seconds", "best_score"]
OBJECT_COLUMNS += BOX_COLUMNS  # on the frame of the best picture
TABLE_HEADERS = ["Class", "Objects", "Most at once", "First (s)", "Last (s)"]
CROSSING_COLUMNS = ["second", "frame", "line", "direction", "class", "number"]  # of the CSV file
LINE_NAMES = "ABCD"
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

    label: str
    number: int
    first_ms: int
    last_ms: int
    seen_ms: int = 0
    counts: bool = False  # it was seen for long enough
    frames: list[int] = field(default_factory=list)  # on which it has not been counted
    best_row: np.ndarray | None = None  # `COLUMNS` on the frame of its picture
    picture: str = ""  # path of a JPEG file


@dataclass
class SeenClass:
    """The objects of a class that count."""

    first_ms: int
    is_there: np.ndarray  # bool (CLASS_BAR_STEPS + 2,), with False at both ends
    last_ms: int = 0
    objects: int = 0
    at_once: Counter[int] = field(default_factory=Counter)  # by frame
    most_at_once: int = 0


class Bar(NamedTuple):
    """A line of the timeline."""

    label: str
    name: str
    spans: list[tuple[float, float]]  # in which it was there, in seconds


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
        # A short video can have objects, too.
        self._enough_ms = 1000 * min(COUNTED_SECONDS, info.duration_seconds / 2)
        self._objects: dict[tuple[int, int], SeenObject] = {}  # by class and number
        self._counted: list[tuple[str, int, int]] = []  # label, number and class of those that count, in this order
        self._classes: dict[str, SeenClass] = {}
        self._crossings: list[Crossing] = []
        self._crossings_per_line: dict[tuple[str, str], list[float]] = {}  # in, out, first second, by line and class

    @property
    def frame_count(self) -> int:
        """How many frames were analysed."""
        return len(self._rows)

    @property
    def detection_count(self) -> int:
        return sum(map(len, self._rows.values()))

    @property
    def object_count(self) -> int:
        return len(self._counted)

    def add(self, frames: Iterable[FrameDetections], pictures: Iterable[Picture] = ()) -> None:
        """Adds frames, and pictures cut out of them. Two GPU calls may show the same frame: the later one holds."""
        for frame in frames:
            self.source_size = frame.source_size
            drawn = frame.drawn
            time_and_frame = np.broadcast_to((frame.pts_seconds, frame.source_index), (len(drawn), 2))
            width, height = frame.source_size
            boxes = np.clip(drawn.xyxy, 0, 1) * (width, height, width, height)
            columns = (time_and_frame, drawn.class_id, drawn.tracker_id, drawn.confidence, boxes)
            self._rows[frame.source_index] = rows = np.column_stack(columns).astype(np.float32)
            self._count(rows)
        for class_id, number, source_index, path in pictures:
            seen, rows = self._objects[class_id, number], self._rows[source_index]
            seen.picture = path
            seen.best_row = rows[(rows[:, 2] == class_id) & (rows[:, 3] == number)][0]

    def _count(self, rows: np.ndarray) -> None:
        """Adds the objects of a frame to those that were seen before."""
        for seconds, frame, class_id, number in rows[:, :4].tolist():
            if number:
                class_id, number, frame, ms = int(class_id), int(number), int(frame), round(1000 * seconds)
                new = SeenObject(self._id2label[class_id], number, ms, ms, frames=[frame])
                seen = self._objects.setdefault((class_id, number), new)
                if ms > seen.last_ms:  # else it is known on this frame
                    seen.seen_ms += min(ms - seen.last_ms, MAX_SIGHTING_MS)
                    seen.last_ms = ms
                    seen.frames.append(frame)
                    if seen.seen_ms >= self._enough_ms:
                        if not seen.counts:
                            bisect.insort(self._counted, (seen.label, number, class_id))
                        self._add_to_class(seen)

    def _add_to_class(self, seen: SeenObject) -> None:
        """Counts an object on the frames on which it has not been counted."""
        if seen.label not in self._classes:
            self._classes[seen.label] = SeenClass(seen.first_ms, np.zeros(CLASS_BAR_STEPS + 2, bool))
        group = self._classes[seen.label]
        group.objects += not seen.counts
        seen.counts = True
        group.first_ms, group.last_ms = min(group.first_ms, seen.first_ms), max(group.last_ms, seen.last_ms)
        group.at_once.update(seen.frames)
        group.most_at_once = max(group.most_at_once, *(group.at_once[frame] for frame in seen.frames))
        seen.frames.clear()
        steps = CLASS_BAR_STEPS / 1000 / self.info.duration_seconds * np.array([seen.first_ms, seen.last_ms])
        first, last = np.minimum(steps.astype(int), CLASS_BAR_STEPS - 1) + 1
        group.is_there[first : last + 1] = True

    def _table(self, rows: Iterable[np.ndarray]) -> pd.DataFrame:
        """Rows with `COLUMNS` as people read them; boxes in pixels of the source."""
        table = pd.DataFrame(np.concatenate([np.zeros((0, len(COLUMNS))), *rows]), columns=COLUMNS)
        table = table.astype({"frame": int, "track": "Int64"}).replace({"track": {0: pd.NA}})
        table["time_seconds"] = self.info.pts_seconds[table["frame"]]  # float32 is too coarse after some hours
        table["label"] = table["label"].map(self._id2label).astype(object)
        return table.round({"time_seconds": 3, "score": 4} | dict.fromkeys(BOX_COLUMNS, 1))

    def detections(self) -> pd.DataFrame:
        """A row per detection, with the columns of the CSV file."""
        return self._table(self._rows.values())

    def counted_objects(self, limit: int | None = None) -> list[SeenObject]:
        """The objects that count, by class and number."""
        return [self._objects[class_id, number] for _, number, class_id in self._counted[:limit]]

    def objects(self) -> pd.DataFrame:
        """A row per object that counts, with `OBJECT_COLUMNS`."""
        counted = self.counted_objects()
        table = self._table([seen.best_row[None] for seen in counted])
        table = table.rename(columns={"time_seconds": "best_seconds", "score": "best_score"})
        for column, name in (("first_seconds", "first_ms"), ("last_seconds", "last_ms"), ("seen_seconds", "seen_ms")):
            table[column] = [getattr(seen, name) / 1000 for seen in counted]
        return table[OBJECT_COLUMNS]

    def objects_per_class(self) -> pd.DataFrame:
        """A row per class with objects that count, with `TABLE_HEADERS`; the most frequent class comes first."""
        rows = [
            (label, seen.objects, seen.most_at_once, seen.first_ms / 1000, seen.last_ms / 1000)
            for label, seen in self._classes.items()
        ]
        table = pd.DataFrame(rows, columns=TABLE_HEADERS).round(1)
        return table.sort_values(["Objects", "Class"], ascending=[False, True])

    def timeline(self) -> list[Bar]:
        """When each object that counts was there, or if there are more than `MAX_BARS`, each class."""
        if len(self._counted) <= MAX_BARS:
            return [
                Bar(seen.label, f"{seen.label} {seen.number}", [(seen.first_ms / 1000, seen.last_ms / 1000)])
                for seen in self.counted_objects()
            ]
        step_seconds = self.info.duration_seconds / CLASS_BAR_STEPS
        return [
            Bar(label, label, (np.flatnonzero(np.diff(seen.is_there)).reshape(-1, 2) * step_seconds).tolist())
            for label, seen in sorted(self._classes.items())
        ]

    def add_crossings(self, crossings: Iterable[Crossing]) -> None:
        for crossing in crossings:
            self._crossings.append(crossing)
            line, label = LINE_NAMES[crossing.line], self._id2label[crossing.class_id]
            second = self.info.pts_seconds[crossing.source_index].round(3)
            counts = self._crossings_per_line.setdefault((line, label), [0, 0, second])
            counts[0 if crossing.is_in else 1] += 1
            counts[2] = min(counts[2], second)

    def crossings(self) -> pd.DataFrame:
        """A row per crossing, by time, with `CROSSING_COLUMNS`. Lines are A to D, directions "in" and "out"."""
        seconds = self.info.pts_seconds
        rows = [
            (seconds[index], index, LINE_NAMES[line], ("out", "in")[is_in], self._id2label[class_id], number)
            for index, line, is_in, class_id, number in sorted(self._crossings)
        ]
        return pd.DataFrame(rows, columns=CROSSING_COLUMNS).round({"second": 3})

    def crossings_per_line(self) -> pd.DataFrame:
        """A row per line and class that crossed it, with `LINE_HEADERS`."""
        rows = [(*key, *counts) for key, counts in sorted(self._crossings_per_line.items())]
        return pd.DataFrame(rows, columns=LINE_HEADERS).round(1)

    def save(self, base: str, settings: Mapping[str, object]) -> dict[str, str]:
        """Writes the files that README.md describes. Returns their paths by kind.

        Args:
            base: Path of the files, without a suffix.
            settings: What the JSON file says besides.
        """
        paths = {"csv": f"{base}.csv", "json": f"{base}.json", "objects": f"{base}-objects.csv"}
        paths |= {"pictures": f"{base}-objects.zip", "mot": f"{base}-mot.zip"}
        found, objects = self.detections(), self.objects()
        found.to_csv(paths["csv"], index=False)
        objects.to_csv(paths["objects"], index=False)
        (width, height), fps = self.source_size, float(self.info.fps)
        video = {"name": Path(self.info.path).name, "width": width, "height": height, "fps": fps}
        video["duration_seconds"] = round(self.info.duration_seconds, 3)
        frames = sorted(self._rows)
        analysed = {"analysed_frame_count": len(frames), "analysed_frames": frames}
        crossings = self.crossings()
        lists = {"objects": records(objects, "best_box"), "detections": records(found, "box")}
        lists["crossings"] = records(crossings)
        content = {"format_version": FORMAT_VERSION, **settings, "video": video, **analysed, **lists}
        Path(paths["json"]).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        with zipfile.ZipFile(paths["pictures"], "w") as file:
            file.write(paths["objects"], "objects.csv")
            for seen in self.counted_objects():
                name = re.sub(r"[^\w-]+", "-", seen.label)  # a label may have any characters
                file.write(seen.picture, f"{name}-{seen.number}.jpg")
        self._save_tracks(found, paths["mot"])
        if settings.get("lines"):
            paths["crossings"] = f"{base}-crossings.csv"
            crossings.to_csv(paths["crossings"], index=False)
        return paths

    def _save_tracks(self, found: pd.DataFrame, path: str) -> None:
        """Writes the tracks in the format of MOTChallenge, as CVAT imports it: datumaro's `MotSeqImporter` reads it.

        CVAT hides a track on frames without a line of their own, so frames between two sightings get interpolated ones.
        """
        labels = [label for _, label in sorted(self._id2label.items())]
        tracks = found.dropna(subset="track").sort_values("frame").groupby(["label", "track"])
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("gt/labels.txt", "\n".join(labels))
            with archive.open("gt/gt.txt", "w") as file:
                for number, ((label, _), rows) in enumerate(tracks, 1):
                    seen = rows["frame"].to_numpy()
                    frames = np.arange(seen[0], seen[-1] + 1)
                    following = np.searchsorted(seen, frames)
                    gaps = 1000 * rows["time_seconds"].diff().to_numpy()[following]
                    is_known = (seen[following] == frames) | (gaps <= MAX_SIGHTING_MS)
                    left, top, right, bottom = (np.interp(frames, seen, rows[side]) for side in BOX_COLUMNS)
                    columns = np.column_stack((frames + 1, left, top, right - left, bottom - top))[is_known]
                    # Frame and class from 1; 1 for "not ignored" and for the visible share.
                    line = f"%d,{number},%.2f,%.2f,%.2f,%.2f,1,{labels.index(label) + 1},1"
                    np.savetxt(file, columns, line)


def records(table: pd.DataFrame, box: str = "") -> list[dict[str, object]]:
    """The rows of a table for a JSON file, with the sides of each box in one list."""
    if box:
        sides, table = table[BOX_COLUMNS].to_numpy().tolist(), table.drop(columns=BOX_COLUMNS)
        table[box] = sides
    return json.loads(table.to_json(orient="records"))
