"""What Gradio 6.31 leaves open to strangers, closed: some of it by an import, the rest by `guard`."""

import os
import shutil
import tempfile
import time
import weakref
from collections import Counter
from pathlib import Path

import gradio as gr
from gradio import blocks, processing_utils, queueing
from gradio.route_utils import MediaStream
from gradio.state_holder import SessionState
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

# ------------------------------------------------------------------------------------------------- links and routes

BLOCKED = [
    "/gradio_api/process_recording",  # hands any upload to ffmpeg, which would follow a playlist in it
    "/gradio_api/file=http{link:path}",  # fetches any page for anybody
    "/gradio_api/file/http{link:path}",
    "/gradio_api/stream/{session}/{run}/{component}/playlist-file",  # joins a whole stream into a file that stays
]
ROUTES = [Route(path, lambda _: PlainTextResponse("Not found", 404), methods=["GET", "POST"]) for path in BLOCKED]


async def refuse_link(_url: str, cache_dir: str) -> str:
    raise gr.Error("Links are not accepted. Please upload the file.", title="No links", print_exception=False)


# Any input may be a link, even a slider's. Gradio would download it before the queue, into memory, without a limit.
processing_utils.async_ssrf_protected_download = refuse_link

# --------------------------------------------------------------------------------------------------- unread answers

UNREAD_SECONDS = 60

_send_message = queueing.Queue.send_message


def send_while_somebody_reads(queue: queueing.Queue, event: queueing.Event, message: object) -> None:
    """Ends all runs of a session that has not read its oldest message for `UNREAD_SECONDS`.

    Gradio only notices a client that breaks off reading, not one that never begins or that stays connected.
    """
    session = event.session_hash
    _send_message(queue, event, message)
    messages = queue.pending_messages_per_session.get(session)
    oldest = messages._queue[0] if messages and messages.qsize() else None
    if oldest is None:
        return
    if getattr(messages, "oldest", None) is not oldest:
        messages.oldest, messages.oldest_since = oldest, time.monotonic()
    elif time.monotonic() - messages.oldest_since > UNREAD_SECONDS:
        for other in [event for job in queue.active_jobs for event in job or ()]:
            if other.session_hash == session:
                other.alive = False
        queue.pending_messages_per_session.pop(session, None)
        queue.pending_event_ids_session.pop(session, None)


queueing.Queue.send_message = send_while_somebody_reads

# --------------------------------------------------------------------------------------------------------- streams


class Segment(dict):
    """A segment of a stream whose "data" is read from the "file" when it is served."""

    def __missing__(self, key: str) -> bytes:
        return Path(self["file"]).read_bytes()


class StreamOnDisk(MediaStream):
    """Gradio keeps all segments in memory: 2.2 GB for an hour at 5 Mbit/s."""

    def __init__(self, desired_output_format: str | None = None):
        super().__init__(desired_output_format)
        os.makedirs(get_upload_folder(), exist_ok=True)
        self.folder = tempfile.mkdtemp(prefix="stream-", dir=get_upload_folder())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    async def add_segment(self, data: dict | None) -> None:
        await super().add_segment(data)
        if data:
            segment = Segment(self.segments[-1], file=f"{self.folder}/{len(self.segments)}")
            Path(segment["file"]).write_bytes(segment.pop("data"))
            self.segments[-1] = segment


blocks.MediaStream = StreamOnDisk


class StreamsOfSession(dict):
    """The streams of a session, by run: a new one replaces those before, of which Gradio would keep all."""

    def setdefault(self, run: str, streams: dict) -> dict:
        if run not in self:
            self.clear()
        return super().setdefault(run, streams)


class Streams(dict):
    """The streams of all sessions.

    Gradio frees those of a session at the end of its heartbeat, and those of a program that has none never. Here, they
    go when they have ended and another session begins to stream.
    """

    def __init__(self, heartbeats: Counter[str]):
        super().__init__()
        self._heartbeats = heartbeats

    def __missing__(self, session: str) -> StreamsOfSession:
        for other, runs in list(self.items()):
            has_ended = all(stream.ended for streams in runs.values() for stream in streams.values())
            if has_ended and not self._heartbeats[other]:
                del self[other]
        self[session] = StreamsOfSession()
        return self[session]


class HeartbeatCounter:
    """Middleware that counts the connections to `/heartbeat` by session."""

    def __init__(self, app: ASGIApp, heartbeats: Counter[str]):
        self._app, self._heartbeats = app, heartbeats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, is_heartbeat, session = scope.get("path", "").partition("/gradio_api/heartbeat/")
        if not is_heartbeat:
            return await self._app(scope, receive, send)
        self._heartbeats[session] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._heartbeats.subtract([session])
            self._heartbeats += Counter()  # without those at 0


# ------------------------------------------------------------------------------------------------------- old answers

# Gradio keeps the last output of each component in each of 10,000 sessions, such as a program's JSON, only for links
# to a page with its values, which nothing here makes. `state_session_capacity` limits the sessions.
SessionState._update_value_in_config = lambda *_: None


def guard(demo: gr.Blocks) -> dict[str, object]:
    """Installs the guards that belong to one app. Returns arguments of FastAPI for `launch(app_kwargs=…)`."""
    heartbeats: Counter[str] = Counter()
    demo.pending_streams = Streams(heartbeats)
    return {"routes": ROUTES, "middleware": [Middleware(HeartbeatCounter, heartbeats=heartbeats)]}
