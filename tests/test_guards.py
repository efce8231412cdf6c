"""`guards.py` in a small app: what a stranger cannot do to Gradio."""

import itertools
import json
import threading
import time
import urllib.request
from collections.abc import Iterator

import gradio as gr
import pytest

import guards


class Server:
    """An app that counts until it is closed, and what its clients ask it."""

    def __init__(self):
        self.ended = threading.Event()
        with gr.Blocks() as self.demo:
            length, result = gr.Number(), gr.Textbox()
            length.submit(self.count, length, result, concurrency_limit=None, api_name="count")
        _, self.url, _ = self.demo.launch(prevent_thread_lock=True, quiet=True)
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
    monkeypatch.setattr(guards, "UNREAD_SECONDS", 0.5)
    app.post("call/count", 1)
    assert app.ended.wait(5)


def test_a_run_ends_if_its_client_stops_reading_but_stays(app, monkeypatch):
    monkeypatch.setattr(guards, "UNREAD_SECONDS", 0.5)
    event = app.post("call/count", 1_000_000)["event_id"]  # enough to fill the connection's buffers
    with app.get(f"call/count/{event}") as answers:
        answers.readline()
        assert app.ended.wait(20)


def test_a_run_goes_on_as_long_as_somebody_reads(app, monkeypatch):
    monkeypatch.setattr(guards, "UNREAD_SECONDS", 0.5)
    event = app.post("call/count", 1)["event_id"]
    until = time.monotonic() + 2
    with app.get(f"call/count/{event}") as answers:
        while time.monotonic() < until:
            assert answers.readline()
        assert not app.ended.is_set()
    assert app.ended.wait(5)
