"""Visitors who are programs that speak plain HTTP, so that they can go without a word."""

import json
import re
import urllib.request


class Visitor:
    """A program that asks for a stream."""

    def __init__(self, server, path, threshold=0.3, endpoint="stream_object_detection"):
        self.url = f"{server}/gradio_api/call/{endpoint}"
        data = [
            {"path": path, "meta": {"_type": "gradio.FileData"}},
            threshold,
            [],
            "Half (fast)",
            "Every frame",
            True,
            True,
        ]
        request = urllib.request.Request(
            self.url, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            event = json.load(response)["event_id"]
        self.answers = urllib.request.urlopen(f"{self.url}/{event}", timeout=60)

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
