"""What Gradio 6.31 leaves open to strangers, closed. To import this is enough, apart from what is passed to `launch`."""

import gradio as gr
from gradio import processing_utils
from starlette.responses import PlainTextResponse
from starlette.routing import Route

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
