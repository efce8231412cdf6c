"""What a stranger cannot do to Gradio, tried with a small app."""

import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from videos import Kind

import app as guarded


class Server:
    """An app that counts until it is closed, one that streams, and what its clients ask it."""

    def __init__(self):
        self.ended = threading.Event()
        with gr.Blocks() as self.demo:
            path, player = gr.Textbox(), gr.Video(streaming=True)
            path.submit(self.stream, path, player, concurrency_limit=None, api_name="stream")
            length, result = gr.Number(), gr.Textbox()
            length.submit(self.count, length, result, concurrency_limit=None, api_name="count")
        app_kwargs = guarded.guard(self.demo)
        _, self.url, _ = self.demo.launch(prevent_thread_lock=True, quiet=True, app_kwargs=app_kwargs)
        self.url = f"{self.url}gradio_api"

    def count(self, length: int) -> Iterator[str]:
        """Endless answers of some length."""
        self.ended.clear()
        try:
            for number in itertools.count():
                yield str(number % 10) * length
                time.sleep(0.02)
        finally:
            self.ended.set()

    def stream(self, path: str) -> Iterator[str]:
        yield from [path] * 3

    def watch(self, path: Path, session: str) -> list[str]:
        """A whole stream. Returns the addresses of its segments, without the server's."""
        event = self.post("call/stream", str(path), session_hash=session)["event_id"]
        answers = self.get(f"call/stream/{event}").read().decode()
        playlist = re.search(r"/(stream/[^\"]*/)playlist.m3u8", answers)[1]
        lines = self.get(f"{playlist}playlist.m3u8").read().decode().splitlines()
        return [playlist + line for line in lines if not line.startswith("#")]

    def is_there(self, path: str) -> bool:
        try:
            with self.get(path) as answer:
                return answer.read(1) == b"G"  # MPEG-TS
        except urllib.error.HTTPError:
            return False

    def post(self, path: str, *data: object, **body: object) -> dict:
        content = json.dumps({"data": data, **body}).encode()
        request = urllib.request.Request(f"{self.url}/{path}", content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)

    def get(self, path: str):
        return urllib.request.urlopen(f"{self.url}/{path}", timeout=20)


@pytest.fixture(scope="module")
def app():
    server = Server()
    yield server
    server.demo.close()


def test_a_run_ends_if_nobody_opens_its_answers(app, monkeypatch):
    monkeypatch.setattr(guarded, "UNREAD_SECONDS", 0.5)
    app.post("call/count", 1)
    assert app.ended.wait(5)


def test_a_run_ends_if_its_client_stops_reading_but_stays(app, monkeypatch):
    monkeypatch.setattr(guarded, "UNREAD_SECONDS", 0.5)
    event = app.post("call/count", 1_000_000)["event_id"]  # enough to fill the connection's buffers
    with app.get(f"call/count/{event}") as answers:
        answers.readline()
        assert app.ended.wait(20)


def test_a_run_goes_on_as_long_as_somebody_reads(app, monkeypatch):
    monkeypatch.setattr(guarded, "UNREAD_SECONDS", 0.5)
    event = app.post("call/count", 1)["event_id"]
    until = time.monotonic() + 2
    with app.get(f"call/count/{event}") as answers:
        while time.monotonic() < until:
            assert answers.readline()
        assert not app.ended.is_set()
    assert app.ended.wait(5)


# --------------------------------------------------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def chunk(tmp_path_factory):
    return Kind("chunk", frames=30).make(tmp_path_factory.mktemp("chunk"))


def files_of_streams() -> list[Path]:
    return list(Path(get_upload_folder()).glob("stream-*/*"))


def test_segments_lie_on_the_disk_instead_of_in_memory(app, chunk):
    before = len(files_of_streams())
    segments = app.watch(chunk, "on-disk")
    assert len(segments) >= 3
    assert all(map(app.is_there, segments))
    streams = [stream for runs in app.demo.pending_streams["on-disk"].values() for stream in runs.values()]
    assert not any(
        isinstance(value, bytes) for stream in streams for segment in stream.segments for value in segment.values()
    )
    assert len(files_of_streams()) == before + len(segments)


def test_a_new_stream_of_a_session_replaces_the_one_before(app, chunk):
    old, new = app.watch(chunk, "twice"), app.watch(chunk, "twice")
    assert not any(map(app.is_there, old))
    assert all(map(app.is_there, new))


def test_a_stream_stays_as_long_as_its_session_has_a_heartbeat(app, chunk):
    with app.get("heartbeat/page") as heartbeat:
        heartbeat.readline()
        of_page, of_program = app.watch(chunk, "page"), app.watch(chunk, "program")
        app.watch(chunk, "next")
        assert app.is_there(of_page[0])
        assert not app.is_there(of_program[0])
    deadline = time.monotonic() + 20
    while app.is_there(of_page[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not app.is_there(of_page[0])
    assert len(files_of_streams()) == len(app.watch(chunk, "last"))


def test_nobody_can_have_a_stream_joined_into_a_file(app, chunk):
    playlist = app.watch(chunk, "joined")[0].rsplit("/", 1)[0]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        app.get(f"{playlist}/playlist-file")


def test_a_session_does_not_keep_its_last_values(app, chunk):
    app.watch(chunk, "forgetful")
    assert chunk.name not in repr(app.demo.state_holder.session_data["forgetful"].config_values)
