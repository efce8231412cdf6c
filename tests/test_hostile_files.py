"""No upload makes the server read another file, open a connection, or run out of memory or time."""

import json
import os
import struct
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import fuzz
import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from streams import stream
from videos import Kind, ask_for_whole_video, ffmpeg, read_chunks
from visitors import inputs

import app

# ---------------------------------------------------------------------------------------- a neighbouring server


class Neighbour(ThreadingHTTPServer):
    """A web server that serves the secret video and counts its connections."""

    def __init__(self, secret: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.secret, self.connections = secret, 0
        self.url = f"http://127.0.0.1:{self.server_port}/secret.ts"

    def verify_request(self, *_: object) -> bool:
        self.connections += 1
        return True


class Handler(BaseHTTPRequestHandler):
    timeout = 1  # second; some connections stay silent

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.secret)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    """A video on the server's disk that no visitor may see."""
    return Kind("secret", "ts", frames=20, audio=()).make(tmp_path_factory.mktemp("secret"))


@pytest.fixture(scope="module")
def web(secret) -> Iterator[Neighbour]:
    neighbour = Neighbour(secret.read_bytes())
    threading.Thread(target=neighbour.serve_forever, daemon=True).start()
    yield neighbour
    neighbour.shutdown()
    neighbour.server_close()


@pytest.fixture(autouse=True)
def no_connection_is_opened(web) -> Iterator[None]:
    before = web.connections
    yield
    assert web.connections == before, "the server was made to open a connection"


@pytest.fixture(scope="module")
def client(server) -> Client:
    return Client(server, verbose=False)


def assert_refused(path: str | Path) -> None:
    """Neither the app nor OpenCV, as the app uses it, gets a picture out of `path`."""
    with pytest.raises(gr.Error) as error:
        list(stream(str(path), 0.3))
    assert error.value.message.endswith(".")
    assert os.path.dirname(path) not in error.value.message or not os.path.dirname(path)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    assert not capture.grab()
    capture.release()


# -------------------------------------------------------------------------- files that point to other files


def hls(target: str) -> str:
    return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n"


def hls_master(target: str) -> str:
    return f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9000\n{target}\n"


def hls_key(target: str) -> str:
    return hls("secret.ts").replace("#EXTINF", f'#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF')


def dash(target: str) -> str:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"'
        ' profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet contentType="video">'
        '<Representation id="1" bandwidth="9000" mimeType="video/mp2t" codecs="avc1.42c00d">'
        f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )


def ffconcat(target: str) -> str:
    return f"ffconcat version 1.0\nfile '{target}'\n"


def sdp(target: str) -> str:
    port = urllib.parse.urlsplit(target).port or 9
    return (
        f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video {port} RTP/AVP 96\r\n"
        "a=rtpmap:96 H264/90000\r\n"
    )


def asx(target: str) -> str:
    return f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>'


def reference(target: str) -> str:
    return f"[Reference]\r\nRef1={target}\r\n"


def pls(target: str) -> str:
    return f"[playlist]\nNumberOfEntries=1\nFile1={target}\nVersion=2\n"


def ram(target: str) -> str:
    return f"{target}\n"


def svg(target: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" height="48">'
        f'<image width="64" height="48" xlink:href="{target}"/></svg>'
    )


def imf(target: str) -> str:
    return (
        '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">'
        f"<Id>urn:uuid:0eb3d1b9-b77b-4d3f-bbe5-7c69b15dca85</Id><Asset><Path>{target}</Path></Asset>"
        "</CompositionPlaylist>"
    )


POINTERS = [
    (hls, "x.m3u8"), (hls_master, "x.m3u8"), (hls_key, "x.m3u8"), (dash, "x.mpd"), (ffconcat, "x.ffconcat"),
    (sdp, "x.sdp"), (asx, "x.asx"), (reference, "x.asf"), (pls, "x.pls"), (ram, "x.ram"), (svg, "x.svg"),
    (imf, "CPL_x.xml"),
]  # fmt: skip


@pytest.mark.parametrize("to", ["file", "neighbouring file", "web"])
@pytest.mark.parametrize(("make", "name"), POINTERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_file_that_points_elsewhere_is_refused(make, name, to, secret, web, tmp_path):
    (tmp_path / "secret.ts").write_bytes(secret.read_bytes())
    path = tmp_path / name
    path.write_text(make({"file": str(secret), "neighbouring file": "secret.ts", "web": web.url}[to]))
    assert_refused(path)


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each box of an mp4 file or of a box that holds others."""
    while data:
        size = int.from_bytes(data[:4], "big")
        yield data[4:8], data[8:size]
        data = data[size:]


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def edited(data: bytes, change: Callable[[bytes, bytes], bytes]) -> bytes:
    """An mp4 file in which each box has the content that `change` returns for its type and old content."""
    holders = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl", b"moof", b"traf")
    return b"".join(
        box(kind, edited(content, change) if kind in holders else change(kind, content))
        for kind, content in boxes(data)
    )


def url_entry(target: str) -> bytes:
    return box(b"url ", bytes(4) + target.encode() + b"\0")


def alias_entry(target: str) -> bytes:
    """As old Macs wrote it; an absolute path is its record of type 2."""
    name, path = Path(target).name.encode(), target.encode()
    path += b"\0" * (len(path) % 2)
    fixed = bytes(50) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    return box(b"alis", bytes(4) + fixed + struct.pack(">HH", 2, len(path)) + path + struct.pack(">hH", -1, 0))


@pytest.mark.parametrize("to", ["file", "web"])
@pytest.mark.parametrize("entry", [url_entry, alias_entry])
def test_a_quicktime_file_whose_pictures_are_in_another_file_is_refused(entry, to, web, tmp_path):
    whole = Kind("whole", "mov", frames=20, audio=()).make(tmp_path)
    target = str(whole) if to == "file" else web.url

    def change(kind: bytes, content: bytes) -> bytes:
        if kind == b"mdat":
            return bytes(len(content))
        return struct.pack(">II", 0, 1) + entry(target) if kind == b"dref" else content

    path = tmp_path / "reference.mov"
    path.write_bytes(edited(whole.read_bytes(), change))
    assert_refused(path)


@pytest.mark.parametrize(
    "name",
    ["{url}", "concat:{path}|{path}", "subfile,,start,0,end,0,,:{path}", "crypto:{path}", "cache:{path}",
     "async:{path}", "tee:{path}", "pipe:0", "fd:", "-", "-i", "/dev/zero", "testsrc2", "data:video/mp2t;base64,AAAA",
     "tcp://{host}", "rtsp://{host}/x", "ftp://{host}/x.ts", "unix:{path}"],
)  # fmt: skip
def test_a_name_with_a_special_meaning_for_ffmpeg_is_refused(name, secret, web):
    assert_refused(name.format(url=web.url, path=secret, host=urllib.parse.urlsplit(web.url).netloc))


def test_a_pattern_does_not_stand_for_other_pictures(tmp_path):
    for number in range(5):
        cv2.imwrite(str(tmp_path / f"{number:03}.png"), np.zeros((48, 64, 3), np.uint8))
    path = tmp_path / "%03d.png"
    path.write_bytes((tmp_path / "000.png").read_bytes())
    assert_refused(path)


# ----------------------------------------------------------------------------------------- over the network


@pytest.mark.parametrize("endpoint", ["stream_object_detection", "detect_video"])
@pytest.mark.parametrize(("make", "name"), [(hls, "x.m3u8"), (hls, "x.mp4"), (ffconcat, "x.mp4"), (dash, "x.mpd")])
def test_an_upload_that_points_elsewhere_is_refused_by_the_server(make, name, endpoint, client, secret, web, tmp_path):
    for target in (str(secret), web.url):
        path = tmp_path / name
        path.write_text(make(target))
        with pytest.raises(AppError, match=r"This file .*\.$"):
            data = [value for value in inputs(endpoint, handle_file(path)) if value is not None]  # without the state
            client.predict(*data, api_name=f"/{endpoint}")


def call(server: str, endpoint: str, video: object, conf_threshold: object = 0.5) -> str:
    """The server's answer to a program that sends `video` as the video."""
    body = json.dumps({"data": inputs(endpoint, video, conf_threshold)}).encode()
    url = f"{server}/gradio_api/call/{endpoint}"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=30) as answer:
        return answer.read().decode()


META = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "video",
    ["{url}", {"path": "{url}"}, {"path": "{url}", **META}, {"url": "{url}", **META},
     {"path": "", "url": "{url}", **META}, {"path": "{secret}"}, {"path": "{secret}", **META}, {"path": "/etc/passwd"},
     {"path": "/etc/passwd", **META}, {"path": "concat:{secret}|{secret}"}, {"path": "file:{secret}"},
     {"path": "{secret}", "is_stream": True, **META}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("endpoint", ["stream_object_detection", "detect_video"])
def test_a_program_cannot_name_a_file_that_it_has_not_uploaded(endpoint, video, server, secret, web):
    video = json.loads(json.dumps(video).replace("{url}", web.url).replace("{secret}", str(secret)))
    answer = call(server, endpoint, video)
    assert "event: error" in answer
    assert "root:" not in answer and "mp4" not in answer


@pytest.mark.parametrize("endpoint", ["stream_object_detection", "detect_video"])
def test_a_link_is_refused_with_a_sentence_in_any_input(endpoint, server):
    """Gradio would download it."""
    link = {"path": "https://example.com/street.mp4", **META}
    for arguments in ((link,), (None, link)):
        assert "Links are not accepted. Please upload the file." in call(server, endpoint, *arguments)


@pytest.mark.parametrize("route", ["file=", "file/"])
def test_the_server_fetches_no_other_page_for_anybody(route, server):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{server}/gradio_api/{route}https://example.com/", timeout=30)
    assert error.value.code == 404


def test_gradios_own_converter_of_screen_recordings_reads_no_other_file(server, secret):
    """It gives any upload to ffmpeg: `process_recording` in Gradio's `routes.py`."""
    head = "--x\r\nContent-Disposition: form-data; name="
    fields = {"remove_segment_start": "0", "remove_segment_end": "0.01"}
    body = "".join(f'{head}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items())
    body += f'{head}"video"; filename="x.mp4"\r\n\r\n{hls(str(secret))}\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{server}/gradio_api/process_recording", body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert b"ftyp" not in answer.read()[:64], "it has made a video of another file"
    except urllib.error.HTTPError as error:
        assert error.code in (403, 404, 405)


# -------------------------------------------------------------------------------------------------- names

NAMES = [
    "with spaces.mp4", "single'quote.mp4", 'double"quote.mp4', "видео 日本語 🎯.mp4", "new\nline.mp4",
    f"{'x' * 200}.mp4", "-dash.mp4", "%03d.mp4", "a:b.mp4", "back\\slash.mp4", "#hash.mp4", "what?.mp4",
    "file:x.mp4", "no suffix",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[bytes, list[bytes]]:
    """A video with a few shapes, and its chunks."""
    folder = tmp_path_factory.mktemp("plain")
    path = folder / "plain.mp4"
    ffmpeg("-t", 0.2, "-i", app.EXAMPLES / "bouncing-shapes.mp4", "-c", "copy", path)
    return path.read_bytes(), chunks_of(path, folder)


def chunks_of(path: Path, folder: Path) -> list[bytes]:
    updates = stream(str(path), 0.3, folder=str(folder))
    return [Path(update.chunk).read_bytes() for update in updates]


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_name_changes_nothing(name, plain, tmp_path):
    video, chunks = plain
    path = tmp_path / name
    path.write_bytes(video)
    assert chunks_of(path, tmp_path) == chunks


@pytest.mark.parametrize("name", ["single'quote.mp4", "видео 🎯.mp4", "new\nline.mp4", "%03d.mp4"])
def test_an_upload_with_an_odd_name_is_detected_as_any_other(name, client, plain, tmp_path):
    video, chunks = plain
    path = tmp_path / name
    path.write_bytes(video)
    (tmp_path / "chunk.mp4").write_bytes(chunks[0])
    annotated, _ = ask_for_whole_video(client, path, 0.3, [], "Half (fast)", "Every frame")
    pictures = [read_chunks([path]).pictures for path in (annotated, tmp_path / "chunk.mp4")]
    np.testing.assert_array_equal(*pictures)


# --------------------------------------------------------------------------------------------------- bombs


def gif(width: int, height: int, hundredths: int = 10, frames: int = 3) -> bytes:
    """Frames of one pixel each on a large canvas."""
    picture = struct.pack("<4sHBBBHHHHB", b"!\xf9\x04\4", hundredths, 0, 0, 0x2C, 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    canvas = struct.pack("<6sHHBBB6s", b"GIF89a", width, height, 0x80, 0, 0, b"\0\0\0\xff\xff\xff")
    return canvas + picture * frames + b";"


def y4m(width: int, height: int) -> bytes:
    return f"YUV4MPEG2 W{width} H{height} F25:1 C420\n".encode() + (b"FRAME\n" + bytes(4096)) * 3


def vp8(width: int, height: int, folder: Path) -> bytes:
    """Each key frame holds its size, with two bits of scaling."""
    data = Kind("vp8", "webm", frames=4, video=("-c:v", "libvpx", "-g", 1), audio=()).make(folder).read_bytes()
    return data.replace(
        b"\x9d\x01\x2a" + struct.pack("<HH", 160, 96), b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
    )


def avi(folder: Path, width: int = 160, height: int = 96, scale: int = 1, rate: int = 30, frames: int = 4) -> bytes:
    data = bytearray(Kind("raw", "avi", frames=4, video=("-c:v", "rawvideo"), audio=()).make(folder).read_bytes())
    struct.pack_into("<I", data, data.find(b"avih") + 8 + 16, frames)
    stream, picture = data.find(b"strh") + 8, data.find(b"strf") + 8
    struct.pack_into("<II4xI", data, stream + 20, scale, rate, frames)
    struct.pack_into("<II", data, picture + 4, width, height)
    return bytes(data)


def mp4(folder: Path, flags: str = "+faststart", **contents: Callable[[bytes], bytes]) -> bytes:
    """A real file in which the boxes with these names have been rewritten."""
    data = Kind("real", frames=20, audio=(), muxer=("-movflags", flags)).make(folder).read_bytes()
    return edited(data, lambda kind, content: contents.get(kind.decode(), bytes)(content))


def many_samples(folder: Path, count: int) -> bytes:
    """A header of 30 bytes that claims `count` frames, all of one size and one duration."""
    return mp4(
        folder,
        stsz=lambda _: struct.pack(">III", 0, 1, count),
        stts=lambda _: struct.pack(">IIII", 0, 1, count, 512),
        stsc=lambda _: struct.pack(">IIIII", 0, 1, 1, count, 1),
        ctts=lambda _: struct.pack(">II", 0, 0),
        stss=lambda _: struct.pack(">III", 0, 1, 1),
    )


def many_samples_in_a_fragment(folder: Path, count: int) -> bytes:
    """The same claim in a fragmented file, in 12 bytes."""
    return mp4(
        folder,
        "+frag_keyframe+empty_moov+default_base_moof",
        tfhd=lambda _: struct.pack(">IIII", 0x020018, 1, 512, 1),  # the duration and size of all samples
        trun=lambda _: struct.pack(">III", 1, count, 0),
    )


BOMBS = {
    "gif_of_30000_x_30000": lambda folder: gif(30000, 30000),
    "gif_of_16000_x_16000": lambda folder: gif(16000, 16000),
    "gif_of_60000_x_2": lambda folder: gif(60000, 2),
    "gif_of_11_minutes_a_frame": lambda folder: gif(64, 48, 65535, 60),
    "y4m_of_30000_x_30000": lambda folder: y4m(30000, 30000),
    "y4m_of_16000_x_16000": lambda folder: y4m(16000, 16000),
    "vp8_of_16000_x_16000": lambda folder: vp8(16000, 16000, folder),
    "avi_of_30000_x_30000": lambda folder: avi(folder, 30000, 30000),
    "avi_of_16000_x_16000": lambda folder: avi(folder, 16000, 16000),
    "avi_of_a_billion_frames": lambda folder: avi(folder, frames=10**9),
    "avi_of_a_billion_frames_a_second": lambda folder: avi(folder, rate=10**9),
    "avi_of_ten_hours_a_frame": lambda folder: avi(folder, scale=36_000, rate=1),
    "mp4_that_claims_30000_x_30000": lambda folder: mp4(
        folder, stsd=lambda old: old[:40] + struct.pack(">HH", 30000, 30000) + old[44:]
    ),
    "mp4_of_a_billion_frames": lambda folder: many_samples(folder, 10**9),
    "mp4_of_ten_million_frames": lambda folder: many_samples(folder, 10**7),
    "mp4_of_twenty_million_frames_in_a_fragment": lambda folder: many_samples_in_a_fragment(folder, 2 * 10**7),
    "mp4_of_ten_hours_a_frame": lambda folder: mp4(
        folder, stts=lambda _: struct.pack(">IIII", 0, 1, 20, 36_000 * 15_360)
    ),
    "mkv_with_a_gap_of_ten_hours": lambda folder: (
        Kind("gap", "mkv", times=[0, 0.04, 0.08, 36_000], audio=()).make(folder).read_bytes()
    ),
}


@pytest.fixture(scope="module")
def checker() -> Iterator[fuzz.Checker]:
    """A process that may be bombed."""
    with fuzz.new_checker() as checker:
        yield checker


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_claims_absurd_sizes_or_times_costs_little(name, checker, tmp_path):
    path = tmp_path / f"{name}.{name.split('_')[0].replace('vp8', 'webm')}"
    path.write_bytes(BOMBS[name](tmp_path))
    outcome = checker.check(path)
    assert not outcome.failure, f"{outcome.failure}; {outcome.seconds:.1f} s, {outcome.memory_bytes >> 20} MB"


def test_damaged_videos_end_in_chunks_or_in_a_sentence(checker, tmp_path):
    outcomes = fuzz.run(checker, 100, seed=0, keep=tmp_path / "failures")
    assert not any(outcome.failure for outcome in outcomes.values()), fuzz.summary(outcomes)
    assert sum(outcome.chunks > 0 for outcome in outcomes.values()) > 30, fuzz.summary(outcomes)
