"""The app as a server: what a program gets that calls it."""

import ast
import asyncio
import base64
import re
import time
from pathlib import Path

import av
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from videos import Kind, ask_for_whole_video, beep_onsets

import app

EXAMPLE = Path(__file__).parents[1] / "examples" / "bouncing-shapes.mp4"


@pytest.fixture(scope="module")
def client(server):
    return Client(server, verbose=False)


def settings(path, conf_threshold=0.3):
    """Everything that the page sends."""
    return [handle_file(path), conf_threshold, [], "Half (fast)", "As many as keep up", True, app.DETECTOR.name]


def test_the_stream_can_be_called_by_name_and_is_as_long_as_the_video(client, tmp_path):
    path = Kind("api", frames=123).make(tmp_path)
    job = client.submit(*settings(path), api_name="/stream_object_detection")
    job.result(timeout=60)
    playlists = [Path(output[0]) for output in job.outputs() if isinstance(output[0], str)]
    seconds = [float(value) for value in re.findall(r"#EXTINF:([\d.]+)", playlists[-1].read_text())]
    assert sum(seconds) == pytest.approx(4.1, abs=0.25)  # the AAC encoder adds a few frames


def test_a_file_that_is_not_a_video_gets_a_sentence_and_the_server_lives_on(client, tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a video")
    with pytest.raises(AppError, match="incomplete or not a video"):
        client.predict(*settings(path), api_name="/stream_object_detection")
    good = Kind("good", frames=4).make(tmp_path)
    assert client.predict(*settings(good), api_name="/stream_object_detection")


def test_no_chunk_stays_on_disk_after_a_run(client, cache, tmp_path):
    path = Kind("tidy", frames=70).make(tmp_path)
    client.predict(*settings(path), api_name="/stream_object_detection")
    assert not list((cache / "tmp").iterdir())


def test_a_run_that_is_replaced_ends_with_nothing_to_show(client, tmp_path):
    path = Kind("replaced", frames=3000, audio=()).make(tmp_path)
    replaced = client.submit(*settings(path), api_name="/stream_object_detection")
    while len(replaced.outputs()) < 3:
        time.sleep(0.05)
    successor = client.submit(*settings(path, 0.9), api_name="/stream_object_detection")  # of the same session
    # Gradio sends the last output again when a run ends, which may be after the successor's first one.
    assert all(output["__type__"] == "update" and "value" not in output for output in replaced.result(timeout=20))
    assert not successor.done()
    successor.cancel()


def test_a_program_gets_the_whole_video_and_the_detections(client, tmp_path):
    path = Kind("whole", frames=123, size=(320, 180)).make(tmp_path)
    annotated, found = ask_for_whole_video(client, path, 0.0, [], "Half (fast)", "Every frame")
    with av.open(annotated) as container:
        assert sum(1 for _ in container.decode(video=0)) == 62
    with av.open(annotated) as container:
        samples = np.concatenate([frame.to_ndarray().T for frame in container.decode(audio=0)])
        assert beep_onsets((samples * 32767).astype(np.int16), 48_000) == pytest.approx([0, 1, 2, 3, 4], abs=0.05)
    assert found["video"] == {"name": "whole.mp4", "width": 320, "height": 180, "fps": 30.0, "duration_seconds": 4.1}
    assert {detection["frame"] for detection in found["detections"]} == set(range(0, 123, 2))


def test_a_program_can_ask_for_every_frame_at_full_size_and_for_some_classes(client):
    annotated, found = ask_for_whole_video(client, EXAMPLE, 0.3, ["star"], "Full")
    with av.open(annotated) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 210
    assert (frames[0].width, frames[0].height) == (640, 360)
    assert {detection["label"] for detection in found["detections"]} == {"star"}


def test_the_name_of_one_class_is_enough(client):
    _, found = ask_for_whole_video(client, EXAMPLE, 0.3, "star")
    assert found["classes"] == ["star"]
    assert {detection["label"] for detection in found["detections"]} == {"star"}


def test_a_program_can_do_without_the_video(client):
    settings = {"video": handle_file(EXAMPLE), "analysed": "Every frame"}
    _, with_video = client.predict(**settings, api_name="/detect_video")
    annotated, found = client.predict(**settings, video_output=False, api_name="/detect_video")
    assert annotated is None
    assert found == with_video | {"video_output": False}


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [("video", str(EXAMPLE), "uploaded"), ("video", None, "uploaded"), ("video", ["x"], "uploaded"),
     ("conf_threshold", "0.5", "number from 0 to 1"), ("conf_threshold", None, "number from 0 to 1"),
     ("conf_threshold", 1.1, "number from 0 to 1"), ("conf_threshold", True, "number from 0 to 1"),
     ("classes", "dog", "triangle, star"), ("classes", ["star", "dog"], "triangle, star"), ("classes", 5, "list"),
     ("resolution", None, "Full"), ("analysed", "all", "Every frame"), ("tracks", None, "true or false"),
     ("video_output", "no", "true or false"), ("model", "no-such-model", app.DETECTOR.name),
     ("lines", 5, "up to four"), ("lines", [[0, 0, 1]], "x1, y1"), ("lines", [[0, 0, 640, 360]], "0 to 1"),
     ("lines", [[0.5, 0.5, 0.5, 0.5]], "two different points"), ("lines", [[0, 0, 1, "1"]], "x1, y1"),
     ("lines", [[0, 0, 1, 1]] * 5, "up to four")],
)  # fmt: skip
def test_a_wrong_argument_gets_a_sentence_that_says_what_is_expected(client, argument, value, expected):
    given = {"video": handle_file(EXAMPLE), argument: value}
    with pytest.raises(AppError, match=f"^{argument} cannot be .*{expected}"):
        client.predict(**given, api_name="/detect_video")


def test_a_program_learns_who_crosses_its_lines(client):
    lines = [[0.5, 0.1, 0.5, 0.9], [0, 0.5, 1, 0.5]]
    _, found = client.predict(handle_file(EXAMPLE), lines=lines, video_output=False, api_name="/detect_video")
    assert found["lines"] == lines
    assert {crossing["line"] for crossing in found["crossings"]} == {"A", "B"}
    for crossing in found["crossings"]:  # what was detected before and after tells the same
        who = [d for d in found["detections"] if (d["label"], d["track"]) == (crossing["class"], crossing["number"])]
        before = max((d for d in who if d["frame"] < crossing["frame"]), key=lambda d: d["frame"])["box"]
        after = min((d for d in who if d["frame"] >= crossing["frame"]), key=lambda d: d["frame"])["box"]
        way = before[0] + before[2] - after[0] - after[2] if crossing["line"] == "A" else after[3] - before[3]
        assert crossing["direction"] == ("in" if way > 0 else "out")


def test_a_waiting_program_is_told_how_far_the_run_is(client, tmp_path):
    job = client.submit(handle_file(Kind("told", frames=150).make(tmp_path)), api_name="/detect_video")
    job.result(timeout=60)
    *before, (_, result) = job.outputs()
    lines = [values["status"] for annotated, values in before if annotated is None]
    assert len(lines) == len(before) > 0
    assert re.match(r"[\d.]+ of 5.0 s|Done: 5.0 s", lines[-1])
    assert "status" not in result


def test_the_api_has_one_endpoint_with_names_defaults_and_descriptions(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/detect_video"}, "programs cannot use the page's stream"
    parameters = endpoints["/detect_video"]["parameters"]
    names = [parameter["parameter_name"] for parameter in parameters]
    expected = "video conf_threshold classes resolution analysed tracks video_output model lines"
    assert names == expected.split()
    assert all(parameter["parameter_has_default"] for parameter in parameters[1:])
    described = [parameter["python_type"]["description"] for parameter in parameters]
    assert described == [app.ARGUMENTS[name] for name in names]
    assert all(text.endswith(".") for text in described)
    assert [value["label"] for value in endpoints["/detect_video"]["returns"]] == ["Annotated video", "Result"]


def test_an_assistant_finds_the_tool_and_calls_it(server):
    mcp = pytest.importorskip("mcp")
    streamable_http = pytest.importorskip("mcp.client.streamable_http")

    async def ignore_progress(*_):  # without it, Gradio 6.31 answers with one text, the whole tuple
        pass

    async def ask(arguments):
        async with (
            streamable_http.streamable_http_client(f"{server}/gradio_api/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            return tools, await session.call_tool("detect_video", arguments, progress_callback=ignore_progress)

    video = "data:video/mp4;base64," + base64.b64encode(EXAMPLE.read_bytes()).decode()
    (tool,), answer = asyncio.run(ask({"video": video, "classes": ["star"], "video_output": False}))
    assert tool.name == "detect_video"
    assert {name: value["description"] for name, value in tool.inputSchema["properties"].items()} == app.ARGUMENTS
    assert not answer.isError
    found = ast.literal_eval(answer.content[-1].text)
    assert {detection["label"] for detection in found["detections"]} == {"star"}
    _, refused = asyncio.run(ask({"video": video, "conf_threshold": 7}))
    assert refused.isError and "conf_threshold cannot be 7" in refused.content[0].text
