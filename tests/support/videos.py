"""Makes videos of every kind with ffmpeg, with numbered frames and a beep per second, and reads chunks back.

Each picture carries its own number in a grid of 4 x 4 dark and light cells: a marker in the first row, which
shows that the picture is neither turned nor mirrored, and twelve bits in the other three. Each quarter has a tint
of its own, so that colours in the wrong place are noticed. The sound has a beep of 50 ms at every whole second.
"""

import itertools
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from gradio_client import Client, handle_file

from video import AudioReader, ChunkWriter, read_video_info, sample_frames

MARKER = (1, 0, 1, 1)
BEEP_SECONDS = 0.05
BLACK, WHITE = 40, 215
# Added to red, green and blue of the four quarters; the brightness stays the same.
TINTS = np.array([[(40, -20, 0), (-40, 20, 0)], [(-13, 0, 40), (13, 0, -40)]])


def ffmpeg(*args: object, stdin: bytes | None = None) -> None:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, args)]
    if stdin is not None:
        command.remove("-nostdin")
    subprocess.run(command, input=stdin, check=True)


def numbered_picture(number: int, width: int, height: int) -> np.ndarray:
    """RGB picture (height, width, 3) uint8 that carries its number."""
    bits = MARKER + tuple(number >> bit & 1 for bit in range(12))
    grid = np.where(np.array(bits).reshape(4, 4), WHITE, BLACK)[..., None] + TINTS.repeat(2, 0).repeat(2, 1)
    rows = np.arange(height) * 4 // height
    columns = np.arange(width) * 4 // width
    return grid.astype(np.uint8)[rows][:, columns]


def read_number(picture: np.ndarray) -> int:
    """The number that a picture (H, W, 3) carries; fails if the picture is turned, mirrored or cropped."""
    height, width = picture.shape[:2]
    centers = [[picture[h : h + 2, w : w + 2].mean() for w in _centers(width)] for h in _centers(height)]
    bits = (np.array(centers) > 128).flatten().astype(int)
    assert tuple(bits[:4]) == MARKER, f"the marker is not where it should be: {bits.reshape(4, 4)}"
    return sum(int(bit) << place for place, bit in enumerate(bits[4:]))


def assert_colours(picture: np.ndarray, tolerance: float = 16) -> None:
    """An RGB picture (H, W, 3) has the colours of its number: as a whole, in its corners, and along each edge."""
    height, width = picture.shape[:2]
    wanted = numbered_picture(read_number(picture), width, height).astype(int)
    h, w = max(1, height // 8), max(1, width // 8)
    regions = {"as a whole": np.s_[:], "top rows": np.s_[:h], "bottom rows": np.s_[-h:]}
    regions |= {"left columns": np.s_[:, :w], "right columns": np.s_[:, -w:]}
    regions |= {"top left": np.s_[:h, :w], "top right": np.s_[:h, -w:]}
    regions |= {"bottom left": np.s_[-h:, :w], "bottom right": np.s_[-h:, -w:]}
    for name, region in regions.items():
        difference = picture[region].mean((0, 1)) - wanted[region].mean((0, 1))
        assert np.abs(difference).max() < tolerance, f"{name}: red, green and blue are off by {difference.round()}"


def _centers(length: int) -> list[int]:
    return [max(0, round(length * (2 * cell + 1) / 8) - 1) for cell in range(4)]


def beeps(seconds: float, rate: int = 48_000) -> np.ndarray:
    """Mono int16: a beep of 1 kHz at every whole second."""
    time = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * 1000 * time) * 12_000
    return np.where(time % 1 < BEEP_SECONDS, wave, 0).astype("<i2")


def beep_onsets(samples: np.ndarray, rate: int) -> list[float]:
    """Seconds at which beeps start in int16 (samples,) or (samples, channels)."""
    loud = (np.abs(samples.astype(int)) > 3_000).any(axis=tuple(range(1, samples.ndim)))
    places = np.flatnonzero(loud)
    starts = places[np.diff(places, prepend=-rate) > rate // 4]
    return (starts / rate).tolist()


@dataclass
class Kind:
    """One kind of video: how ffmpeg makes it, and its expected output.

    `video` and `audio` are ffmpeg's output options; without `audio` there is no sound. `times` are the seconds at
    which the frames are shown; without them, the rate is constant.
    """

    name: str
    suffix: str = "mp4"
    rate: Fraction = Fraction(30)
    frames: int = 95
    size: tuple[int, int] = (160, 96)
    video: Sequence[object] = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
    audio: Sequence[object] = ("-c:a", "aac")
    audio_seconds: float | None = None  # as long as the video
    audio_filter: str = "anull"
    times: Sequence[float] | None = None
    last_seconds: float | None = None  # how long the last frame is shown
    muxer: Sequence[object] = ()
    output_size: tuple[int, int] | None = None
    beep_shift: float = 0.0  # how much later the sound starts than the picture
    first_beep: float = 0.0  # some codecs swallow the first one
    colour_tolerance: float = 16  # levels of 255
    after: Sequence[object] = field(default=())  # a second pass over the finished file, copying

    @property
    def shown_at(self) -> list[float]:
        if self.times is not None:
            return list(self.times)
        return [float(n / self.rate) for n in range(self.frames)]

    @property
    def seconds(self) -> float:
        return self.shown_at[-1] + (self.last_seconds or float(1 / self.rate))

    def make(self, folder: Path) -> Path:
        width, height = self.size
        times = self.shown_at
        raw, sound = folder / f"{self.name}.raw", folder / f"{self.name}.wav"
        path = folder / f"{self.name}.{self.suffix}"
        raw.write_bytes(b"".join(numbered_picture(n, width, height).tobytes() for n in range(len(times))))
        inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", self.rate, "-i", raw]
        filters = "null"
        if self.times is not None:
            # Whole milliseconds; a sum of steps, since ffmpeg has no look-up table.
            table = "+".join(f"gte(N,{n})*{round((times[n] - times[n - 1]) * 1000)}" for n in range(1, len(times)))
            filters += f",settb=1/1000,setpts='{table or 0}'"
        outputs = ["-map", "0:v", "-vf", filters, *self.video]
        if self.times is not None:
            outputs += ["-fps_mode", "passthrough", "-enc_time_base", "1:1000"]
        if self.audio:
            seconds = self.seconds if self.audio_seconds is None else self.audio_seconds
            ffmpeg("-f", "s16le", "-ar", 48000, "-ac", 1, "-i", "-", sound, stdin=beeps(seconds).tobytes())
            inputs += ["-i", sound]
            outputs += ["-map", "1:a", "-af", self.audio_filter, *self.audio]
        made = folder / f"{self.name}-made.{self.suffix}" if self.after else path
        ffmpeg(*inputs, *outputs, *self.muxer, made)
        if self.after:
            ffmpeg(*(made if a == "IN" else a for a in self.after), path)
            made.unlink()
        raw.unlink()
        sound.unlink(missing_ok=True)
        return path


@dataclass
class Output:
    """Pictures and sound of chunks that are played one after the other."""

    pictures: list[np.ndarray]  # RGB, (H, W, 3) uint8
    fps: Fraction
    seconds: float
    audio: np.ndarray  # int16 (samples, channels); no samples where there is no sound


def read_chunks(paths: Sequence[str | Path]) -> Output:
    """Decodes chunks. Each must be H.264 in 4:2:0, begin with a key frame, and have the same frame rate."""
    pictures, audio, rates, seconds = [], [], set(), 0.0
    for path in paths:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
            assert context.width % 2 == 0 and context.height % 2 == 0
            assert next(container.demux(stream)).is_keyframe
            rates.add(stream.average_rate)
            seconds += float(stream.duration * stream.time_base)
        with av.open(str(path)) as container:
            pictures += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        with av.open(str(path)) as container:
            if container.streams.audio:
                audio += [
                    frame.to_ndarray().reshape(-1, frame.layout.nb_channels) for frame in container.decode(audio=0)
                ]
    assert len(rates) == 1, f"the rate changes between chunks: {rates}"
    sound = np.concatenate(audio) if audio else np.zeros((0, 1), np.int16)
    return Output(pictures, rates.pop(), seconds, sound)


def write_chunks(
    path: Path, folder: str | Path, scale: Fraction = Fraction(1, 2), step: int = 2, start: int = 0
) -> list[str]:
    """Writes a video as chunks of two seconds, with its sound and without any box. Returns their paths.

    Args:
        step: The source has this many frames per output frame.
        start: The output frame to begin with.
    """
    info = read_video_info(path)
    fps = info.fps / step
    chunk_frames = max(1, round(2 * fps))
    audio = AudioReader(info, start / fps) if info.audio_channels else None
    chunks = []
    frames = enumerate(sample_frames(info, fps, scale, start), start)
    for _, items in itertools.groupby(frames, lambda item: item[0] // chunk_frames):
        indices, group = zip(*items, strict=True)
        with ChunkWriter(str(folder), group[0].image.shape[1::-1], fps, info.audio_channels) as writer:
            for frame in group:
                writer.write(frame.image)
            if audio:
                writer.write_audio(audio.read_until((indices[-1] + 1) / fps))
        chunks.append(writer.path)
    return chunks


def play(path: Path, scale: Fraction = Fraction(1, 2), step: int = 2, start: int = 0) -> Output:
    """A video as its chunks show it, by default at half the size and every second frame."""
    with tempfile.TemporaryDirectory(prefix="play-") as folder:
        return read_chunks(write_chunks(path, folder, scale, step, start))


def ask_for_whole_video(client: Client, path: Path, *settings: object) -> tuple[str, dict]:
    """The answer of the endpoint `detect_video`: the path of the annotated video, and the detections."""
    annotated, found = client.predict(handle_file(path), *settings, api_name="/detect_video")
    return annotated["video"] if isinstance(annotated, dict) else annotated, found
