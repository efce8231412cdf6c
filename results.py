"""What a run has found: rows, objects, counts over time, and the files to download.

It knows neither the model nor the page. An object counts once it was seen for `COUNTED_SECONDS`; one that flickers up
in a frame does not.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracking import Detections
from video import VideoInfo

COUNTED_SECONDS = 1.0  # how long an object must be seen to count
MAX_SIGHTING_SECONDS = 0.5  # between two sightings, at most this counts as seen
PLOT_POINTS = 200  # of the counts over time, at most

BOX_COLUMNS = ["x1", "y1", "x2", "y2"]
COLUMNS = ["time_seconds", "frame", "label", "track", "score", *BOX_COLUMNS]  # of the CSV file
FORMAT_VERSION = 1  # of the JSON file: higher if a key changes or goes, not if one is added
TABLE_HEADERS = ["Class", "Objects", "Most at once", "First (s)", "Last (s)"]


class FrameDetections(NamedTuple):
    """What was found on one analysed frame."""

    source_index: int  # number of the frame in the source, from 0
    pts_seconds: float  # from the first frame of the source
    source_size: tuple[int, int]  # width and height in pixels, upright
    detections: Detections  # all that the model found, whatever the threshold
    drawn: Detections  # those above the threshold and in the chosen classes, with the numbers of their objects


class Results:
    """The drawn detections of a run so far.

    Args:
        info: The video.
        id2label: Names of the classes by `class_id`.
    """

    def __init__(self, info: VideoInfo, id2label: Mapping[int, str]):
        self.info, self._id2label = info, id2label
        self.source_size: tuple[int | None, int | None] = (None, None)  # width and height in pixels, upright
        # A float32 (N, 9) array per frame, by source index: `COLUMNS`, with the class's id as its label.
        self._rows: dict[int, np.ndarray] = {}

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
            boxes = np.clip(drawn.xyxy, 0, 1) * (frame.source_size * 2)
            columns = (time_and_frame, drawn.class_id, drawn.tracker_id, drawn.confidence, boxes)
            self._rows[frame.source_index] = np.column_stack(columns).astype(np.float32)

    def detections(self) -> pd.DataFrame:
        """A row per detection, with the columns of the CSV file; boxes in pixels of the source."""
        table = pd.DataFrame(np.concatenate([np.zeros((0, len(COLUMNS))), *self._rows.values()]), columns=COLUMNS)
        table = table.astype({"frame": int, "track": "Int64"}).replace({"track": {0: pd.NA}})
        table["label"] = table["label"].map(self._id2label).astype(object)
        return table.round({"time_seconds": 3, "score": 4} | dict.fromkeys(BOX_COLUMNS, 1))

    def counted_detections(self) -> pd.DataFrame:
        """The detections of objects that count, and as `at_once` how many of their class are on the same frame."""
        numbered = self.detections().dropna(subset="track")
        objects = [numbered["label"], numbered["track"]]
        seconds = numbered.groupby(objects)["time_seconds"].diff().clip(upper=MAX_SIGHTING_SECONDS)
        enough = min(COUNTED_SECONDS, self.info.duration_seconds / 2)  # a short video can have objects
        counted = numbered[seconds.groupby(objects).transform("sum") >= enough]
        return counted.assign(at_once=counted.groupby(["frame", "label"])["track"].transform("size"))

    def objects_per_class(self, counted: pd.DataFrame) -> pd.DataFrame:
        """A row per class of `counted_detections`, with `TABLE_HEADERS`; the most frequent class comes first."""
        classes = counted.groupby("label")
        seconds = classes["time_seconds"]
        columns = [classes["track"].nunique(), classes["at_once"].max(), seconds.min(), seconds.max()]
        table = pd.concat(columns, axis=1).round(1).reset_index().set_axis(TABLE_HEADERS, axis=1)
        return table.sort_values(["Objects", "Class"], ascending=[False, True])

    def counts_over_time(self, counted: pd.DataFrame, end_seconds: float) -> pd.DataFrame:
        """The most objects of each class at once, per second or longer: columns `second`, `class` and `count`.

        Args:
            counted: As `counted_detections` returns it.
            end_seconds: Time of the last frame that was analysed.
        """
        seconds_per_point = max(1, math.ceil(self.info.duration_seconds / PLOT_POINTS))
        counted = counted.assign(second=counted["time_seconds"] // seconds_per_point * seconds_per_point)
        points = range(0, int(end_seconds) + 1, seconds_per_point)
        counts = counted.pivot_table("at_once", "second", "label", "max").reindex(points).fillna(0).astype(int)
        return counts.rename_axis("second").reset_index().melt("second", var_name="class", value_name="count")

    def save(self, base: str, settings: Mapping[str, object]) -> list[str]:
        """Writes the detections as CSV and JSON, which README.md describes. Returns the paths.

        Args:
            base: Path of the files, without a suffix.
            settings: What the JSON file says besides.
        """
        csv_path, json_path = f"{base}.csv", f"{base}.json"
        found = self.detections()
        found.to_csv(csv_path, index=False)
        found["box"] = found[BOX_COLUMNS].to_numpy().tolist()
        (width, height), fps = self.source_size, float(self.info.fps)
        video = {"name": Path(self.info.path).name, "width": width, "height": height, "fps": fps}
        video["duration_seconds"] = round(self.info.duration_seconds, 3)
        frames = sorted(self._rows)
        analysed = {"analysed_frame_count": len(frames), "analysed_frames": frames}
        detections = json.loads(found.drop(columns=BOX_COLUMNS).to_json(orient="records"))
        content = {"format_version": FORMAT_VERSION, **settings, "video": video, **analysed, "detections": detections}
        Path(json_path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return [csv_path, json_path]
