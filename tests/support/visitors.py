"""Visitors who are programs that speak plain HTTP, so that they can go without a word."""

import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
import uuid


def inputs(endpoint, video, threshold=0.3):
    """The data of a call: every frame, with the shipped detector."""
    data = [video, threshold, [], "Half (fast)", "Every frame", True]
    model, lines = "shapes-rtdetr", []
    return data + ([True, model, lines] if endpoint == "detect_video" else [model, None])


class Visitor:
    """A program that asks for a stream."""

    def __init__(self, server, path, threshold=0.3, endpoint="stream_object_detection"):
        data = inputs(endpoint, {"path": path, "meta": {"_type": "gradio.FileData"}}, threshold)
        url = f"{server}/gradio_api/call/{endpoint}"
        request = urllib.request.Request(url, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            event = json.load(response)["event_id"]
        self.answers = urllib.request.urlopen(f"{url}/{event}", timeout=60)

    def wait_for(self, pattern):
        line = b""
        for line in self.answers:
            if re.search(pattern, line.decode()):
                return
        raise AssertionError(f"no answer has {pattern} in it, the last is {line}")

    def leave(self):
        self.answers.close()


def upload(server, path):
    """The path of an uploaded file on the server."""
    boundary = "-----visitor"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
    body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(f"{server}/gradio_api/upload", body, kind)) as response:
        return json.load(response)[0]


class Viewer:
    """A page without a browser: it watches a stream, as hls.js does, and changes the threshold.

    Each run is a call of a handler that the page calls, first `start` and then `redraw`, within one session.
    """

    def __init__(self, server, path):
        self.server, self.session = f"{server}/gradio_api", uuid.uuid4().hex
        with urllib.request.urlopen(f"{server}/config", timeout=30) as answer:
            config = json.load(answer)
        self.handlers = {event["api_name"]: event for event in config["dependencies"]}
        self.defaults = {component["id"]: component["props"].get("value") for component in config["components"]}
        self.video = {"path": path, "meta": {"_type": "gradio.FileData"}}
        self.playlist, self.is_gone = None, False  # the address of the newest one
        self.heartbeat = urllib.request.urlopen(f"{self.server}/heartbeat/{self.session}", timeout=300)

    def join(self, handler, *data):
        """Calls it with the video, with `data`, and with the page's defaults for its other inputs."""
        event, data = self.handlers[handler], [self.video, *data]
        data += [self.defaults[component] for component in event["inputs"][len(data) :]]
        body = {"fn_index": event["id"], "session_hash": self.session, "data": data}
        request = urllib.request.Request(
            f"{self.server}/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=30).close()

    def listen(self):
        """Keeps `playlist` up to date."""
        while not self.is_gone:
            with urllib.request.urlopen(
                f"{self.server}/queue/data?session_hash={self.session}", timeout=300
            ) as answers:
                for line in answers:
                    if self.is_gone:
                        return
                    if found := re.search(r"/stream/[^\"]+/playlist\.m3u8", line.decode()):
                        self.playlist = found[0]
            time.sleep(0.1)  # it ends with the last run

    def watch(self, moves):
        """Plays the video. Returns the seconds until the first chunk, to the end, at a halt, and after each move.

        After a move, it takes until the new stream has got to the viewer's place.

        Args:
            moves: For each, the second of the video after which it comes, and the threshold.
        """
        threading.Thread(target=self.listen, daemon=True).start()
        began = last = time.monotonic()
        self.join("stream_object_detection", 0.3)
        position, halted, first_chunk, moves, back, moved = 0.0, 0.0, None, list(moves), [], None
        shown, available, has_ended, segments = None, 0.0, False, set()
        while moved or not (has_ended and position >= available):
            time.sleep(0.25)
            assert last - began < 600, "the video never ends"
            with contextlib.suppress(urllib.error.HTTPError):  # a stream goes just before the next one is announced
                seconds, ended = self.read(self.playlist, segments) if self.playlist else (0.0, False)
                if self.playlist == shown or seconds > position or ended:
                    if self.playlist != shown and moved:
                        back.append(time.monotonic() - moved)
                        moved = None
                    shown, available, has_ended = self.playlist, seconds, ended
            now = time.monotonic()
            if first_chunk is None and available:
                first_chunk = now - began
            elif available:
                played = min(now - last, available - position)
                position += played
                halted += 0 if has_ended else now - last - played
            last = now
            if moves and position > moves[0][0]:
                moved, (_, threshold) = now, moves.pop(0)
                self.join("redraw", threshold, position)
        return {"first": first_chunk, "end": time.monotonic() - began, "halted": halted, "back": back}

    def read(self, playlist, segments):
        """How many seconds are there, and whether it is all. Loads what is not in `segments`, as a player does."""
        with urllib.request.urlopen(f"{self.server}{playlist}", timeout=30) as answer:
            text = answer.read().decode()
        for name in set(re.findall(r"^[^#\s]+", text, re.M)) - segments:
            urllib.request.urlopen(f"{self.server}{playlist.rsplit('/', 1)[0]}/{name}", timeout=30).read()
            segments.add(name)
        return sum(map(float, re.findall(r"EXTINF:([\d.]+)", text))), "ENDLIST" in text

    def leave(self):
        self.is_gone = True
        with contextlib.suppress(OSError):
            self.heartbeat.close()
