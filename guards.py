"""What Gradio 6.31 leaves open to strangers, closed. An import does it, apart from what is passed to `launch`."""

import time

import gradio as gr
from gradio import processing_utils, queueing
from starlette.responses import PlainTextResponse
from starlette.routing import Route

# ------------------------------------------------------------------------------------------------- links and routes

BLOCKED = [
    "/gradio_api/process_recording",  # hands any upload to ffmpeg, which would follow a playlist in it
    "/gradio_api/file=http{link:path}",  # fetches any page for anybody
    "/gradio_api/file/http{link:path}",
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
