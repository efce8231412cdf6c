"""Damages small videos in a seeded way: each must soon end in chunks or in a sentence, and leave nothing behind.

    python tests/fuzz.py --files 500 --seed 0

The app runs in a process of its own, so that a crash is noticed, and ends neither this script nor the tests.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import resource
import shutil
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import conftest  # the detector that ships with the app, and a cache folder for the tests
import gradio as gr
import numpy as np
from streams import busy_threads
from videos import ffmpeg, read_chunks

import app

SECONDS = 10  # for one file
PATIENCE_SECONDS = 3 * SECONDS  # until a silent process counts as hung
MEMORY_BYTES = 500 << 20  # for one file, on top of the app's own
ADDRESS_BYTES = 4 << 30  # that a process may reserve on top of those at its start, so that the machine survives

# Name, output options and size; eight frames and, where the container allows it, sound.
X264 = "-c:v libx264 -pix_fmt yuv420p -g 4"
SOURCES = [
    ("h264.mp4", f"{X264} -c:a aac", "64x48"),
    ("index_first.mp4", f"{X264} -c:a aac -movflags +faststart", "64x48"),
    ("fragments.mp4", f"{X264} -c:a aac -movflags frag_keyframe+empty_moov", "64x48"),
    ("av1.mp4", "-c:v libaom-av1 -cpu-used 8 -c:a aac", "64x64"),
    ("mjpeg.mov", "-c:v mjpeg -q:v 5 -c:a pcm_s16le", "64x48"),
    ("hevc.mkv", "-c:v libx265 -x265-params log-level=0 -c:a libopus", "64x64"),
    ("vp9.mkv", "-c:v libvpx-vp9 -cpu-used 8 -c:a libvorbis", "64x48"),
    ("vp8.webm", "-c:v libvpx -c:a libopus", "64x48"),
    ("mpeg4.avi", "-c:v mpeg4 -c:a libmp3lame", "64x48"),
    ("h264.ts", f"{X264} -c:a aac", "64x48"),
    ("mpeg2.mpg", "-r 25 -c:v mpeg2video -c:a mp2", "64x48"),
    ("flv1.flv", "-c:v flv1 -c:a libmp3lame -ar 44100", "64x48"),
    ("theora.ogv", "-c:v libtheora -c:a libvorbis", "64x48"),
    ("h263.3gp", "-c:v h263 -c:a aac", "128x96"),
    ("wmv2.wmv", "-c:v wmv2 -c:a wmav2", "64x48"),
    ("picture.gif", "-pix_fmt rgb8 -an", "64x48"),
    ("raw.y4m", "-pix_fmt yuv420p -an", "32x24"),
]


def make_sources(folder: Path) -> list[Path]:
    """The videos as they are before any damage, the same bytes each time."""
    paths = []
    for name, options, size in SOURCES:
        paths.append(folder / name)
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:r=10:d=0.8", "-f", "lavfi", "-i", "sine=r=48000:d=0.8",
               "-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact", "-threads", 1,
               *options.split(), paths[-1])  # fmt: skip
    return paths


def damaged(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one to three injuries; a foreign piece comes from `other`."""
    for _ in range(rng.integers(1, 4)):
        # Often where the headers are, the first or the last bytes.
        places = [rng.integers(len(data)), rng.integers(400), len(data) - rng.integers(400)]
        start = int(rng.choice(places, p=[0.6, 0.3, 0.1]))
        start = min(max(0, start), len(data) - 1)
        stop = min(len(data), start + int(2 ** rng.uniform(0, 11)))
        injury = rng.choice(["cut", "drop", "flip", "noise", "zeros", "extreme", "splice", "repeat"])
        piece = bytearray(data[start:stop])
        if injury == "cut":
            data = data[: max(16, start)]
            continue
        if injury == "flip":
            for place in rng.integers(len(piece), size=rng.integers(1, 9)):
                piece[place] ^= 1 << rng.integers(8)
        elif injury == "extreme":  # in the place of a size, a count, a duration
            number = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
            piece[:4] = int(number).to_bytes(4, str(rng.choice(["big", "little"])))
        elif injury == "splice":
            place = int(rng.integers(len(other)))
            piece += other[place : place + len(piece)]
        elif injury == "repeat":
            piece *= int(rng.integers(2, 30))
        else:
            piece = {"drop": b"", "noise": rng.bytes(len(piece)), "zeros": bytes(len(piece))}[str(injury)]
        data = data[:start] + bytes(piece) + data[stop:] or b"\0"
    return data


def damaged_files(count: int, seed: int, folder: Path) -> Iterator[Path]:
    """`count` damaged videos, each made by its seed and number alone, one at a time in `folder`."""
    sources = make_sources(folder)
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        source = sources[number % len(sources)]
        other = sources[rng.integers(len(sources))]
        path = folder / f"{seed}-{number}-{source.name}"
        path.write_bytes(damaged(source.read_bytes(), other.read_bytes(), rng))
        yield path
        path.unlink()


class Outcome(NamedTuple):
    """How a file ended; `failure` is empty if all is well."""

    chunks: int
    error: str  # the sentence of a `gr.Error`
    seconds: float
    memory_bytes: int  # at its peak, on top of the app's own
    failure: str


def check(path: str) -> Outcome:
    """Streams a file through the app, in this process."""
    gc.collect()
    threads, files, memory = busy_threads(), count_open_files(), forget_memory_peak()
    with tempfile.TemporaryDirectory(prefix="chunks-") as folder:
        started = time.monotonic()
        chunks, error, failure = stream(path, folder)
        seconds, memory_bytes = time.monotonic() - started, memory_peak() - memory
        if memory_bytes > MEMORY_BYTES:
            failure = failure or f"{memory_bytes >> 20} MB of memory"
        try:
            if chunks and not failure:
                read_chunks(chunks)
        except Exception as raised:
            failure = f"a chunk cannot be played: {cause(raised)}"
        failure = failure or left_behind(threads, files, set(os.listdir(folder)) - set(map(os.path.basename, chunks)))
    return Outcome(len(chunks), error, seconds, memory_bytes, failure)


def stream(path: str, folder: str) -> tuple[list[str], str, str]:
    """The chunks of a file, the sentence of its error, and the failure, which is empty if all is well."""
    started = time.monotonic()
    chunks: list[str] = []
    try:
        with contextlib.closing(app.stream_object_detection(path, 0.3, plan=app.Plan(folder=folder))) as updates:
            for update in updates:
                chunks.append(update.chunk)
                for picture in update.pictures:
                    os.remove(picture.path)
                if time.monotonic() - started > SECONDS:
                    return chunks, "", f"no end after {SECONDS} s and {len(chunks)} chunks"
    except gr.Error as error:
        is_sentence = error.message.endswith(".") and os.path.dirname(path) not in error.message
        return chunks, error.message, "" if is_sentence else f"not a sentence: {error.message}"
    except BaseException as raised:
        return chunks, "", cause(raised)
    return chunks, "", "" if chunks else "neither a chunk nor an error"


def cause(error: BaseException) -> str:
    """The error, and the last line of the app or of the tests that it went through."""
    ours = [
        line for line in traceback.extract_tb(error.__traceback__) if Path(line.filename).is_relative_to(conftest.ROOT)
    ]
    return f"{type(error).__name__}: {error} ({Path(ours[-1].filename).name}:{ours[-1].lineno}, {ours[-1].name})"


def left_behind(threads: set[threading.Thread], files: int, names: set[str]) -> str:
    """Threads and open files that were not there before and do not end within three seconds, and names of files."""
    deadline = time.monotonic() + 3
    while True:
        gc.collect()
        left = names | {f"thread {thread.name}" for thread in busy_threads() - threads}
        left |= {"an open file"} if count_open_files() > files else set()
        if not left or time.monotonic() > deadline:
            return f"left behind: {', '.join(sorted(left))}" if left else ""
        time.sleep(0.05)


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def forget_memory_peak() -> int:
    """Bytes in memory now; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_peak()


def memory_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def serve(connection: Connection, sound: Path) -> None:
    """Checks each path that comes. An undamaged one goes first, because some threads and files are made only once."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ADDRESS_BYTES,) * 2)
    shutil.rmtree(os.environ["GRADIO_TEMP_DIR"])  # its own; the next one is removed even if this process is killed
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(dir=sound.parent)
    check(str(sound))
    gc.collect()
    gc.freeze()  # spares each file a look at all objects that stay
    connection.send("ready")
    for path in iter(connection.recv, None):
        connection.send(check(path))


class Checker:
    """A process that checks files, and is replaced when one of them crashes it or makes it hang."""

    def __init__(self, sound: Path):
        self._sound, self._process = sound, None

    def check(self, path: Path) -> Outcome:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, self._sound), daemon=True)
            self._process.start()
            theirs.close()
            assert self._connection.poll(10 * PATIENCE_SECONDS) and self._connection.recv() == "ready"
        started = time.monotonic()
        self._connection.send(str(path))
        try:
            if self._connection.poll(PATIENCE_SECONDS):
                return self._connection.recv()
            failure = "hangs"
        except EOFError:
            self._process.join(5)
            failure = f"the process has died: exit code {self._process.exitcode}"
        self.close()
        return Outcome(0, "", time.monotonic() - started, 0, failure)

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.join()
            self._process = None


@contextlib.contextmanager
def new_checker() -> Iterator[Checker]:
    """A checker that is closed in the end."""
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound.mp4"
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=0.8", "-c:v", "libx264", "-pix_fmt", "yuv420p", sound)
        with contextlib.closing(Checker(sound)) as checker:
            yield checker


def run(checker: Checker, count: int, seed: int, keep: Path) -> dict[str, Outcome]:
    """Checks `count` damaged videos, and copies those that fail into `keep`."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in damaged_files(count, seed, Path(folder)):
            outcomes[path.name] = outcome = checker.check(path)
            if outcome.failure:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / path.name).write_bytes(path.read_bytes())
    return outcomes


def summary(outcomes: dict[str, Outcome]) -> str:
    name, slowest = max(outcomes.items(), key=lambda item: item[1].seconds)
    hungriest = max(outcomes, key=lambda name: outcomes[name].memory_bytes)
    sentences = Counter(outcome.error for outcome in outcomes.values() if outcome.error)
    lines = [
        f"{len(outcomes)} files: {sum(o.chunks > 0 for o in outcomes.values())} gave chunks, "
        f"{sum(bool(o.error) for o in outcomes.values())} an error, "
        f"{sum(bool(o.failure) for o in outcomes.values())} failed",
        f"slowest: {name}, {slowest.seconds:.1f} s; "
        f"hungriest: {hungriest}, {outcomes[hungriest].memory_bytes >> 20} MB",
        *(f"{count:5} x {error}" for error, count in sentences.most_common()),
        *(f"FAILED {name}: {outcome.failure}" for name, outcome in outcomes.items() if outcome.failure),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for the files that fail")
    options = parser.parse_args()
    with new_checker() as checker:
        outcomes = run(checker, options.files, options.seed, options.keep)
    print(summary(outcomes))
    raise SystemExit(any(outcome.failure for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
