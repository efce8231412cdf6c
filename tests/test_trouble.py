"""What goes wrong on a server: a sentence for the visitor, a traceback in the log, and the next one is served."""

import contextlib
import resource
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from videos import Kind, read_chunks

import app


@pytest.fixture
def video(tmp_path):
    return str(Kind("trouble", frames=82, audio=()).make(tmp_path))


def watch(video, conf_threshold=0.3):
    """What the page gets of a run: the pictures, the status lines, and the error at its end or None."""
    request, pictures, lines = SimpleNamespace(session_hash="a visitor"), [], []
    try:
        for chunk, status, *_ in app.stream_to_page(video, conf_threshold, [], app.HALF, request):
            lines.append(status)
            if isinstance(chunk, str):
                pictures += read_chunks([chunk]).pictures
    except gr.Error as error:
        return pictures, lines, error
    return pictures, lines, None


def with_memory_for(frames, forward):
    """A forward pass that runs out of memory with more frames than that."""

    def limited(*args, **kwargs):
        if len(kwargs["pixel_values"]) > frames:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    return limited


def test_a_batch_that_does_not_fit_into_memory_is_tried_in_smaller_parts(monkeypatch):
    frames = list(np.random.default_rng(0).integers(0, 255, (7, 90, 160, 3), np.uint8))
    expected = [app.DETECTOR([frame])[0] for frame in frames]
    monkeypatch.setattr(app.DETECTOR.model, "forward", with_memory_for(2, app.DETECTOR.model.forward))
    for found, alone in zip(app.DETECTOR(frames), expected, strict=True):
        np.testing.assert_allclose(found, alone, atol=1e-4)


def test_without_any_memory_there_is_a_sentence_and_the_next_visitor_is_served(video, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(app.DETECTOR.model, "forward", with_memory_for(0, app.DETECTOR.model.forward))
        pictures, lines, error = watch(video)
    assert not pictures
    assert error.message == lines[-1] == "The GPU is out of memory. Try again in a minute."
    assert len(watch(video)[0]) == 41


def test_what_was_made_before_something_failed_is_not_lost(video, monkeypatch, caplog):
    detect, calls = app.Detector.__call__, []

    def failing(*args):
        calls.append(args)
        if len(calls) > 2:  # 15 frames each: in the second chunk
            raise RuntimeError(f"cannot read {video}")
        return detect(*args)

    monkeypatch.setattr(app.Detector, "__call__", failing)
    pictures, lines, error = watch(video)
    assert len(pictures) == 30
    assert lines[-1] == error.message == "Something went wrong on the server. Its log says what."
    assert "RuntimeError: cannot read" in caplog.text, "the log has the traceback"


@contextlib.contextmanager
def files_limited_to(size):
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 6_000, 14_000])  # fails in the store, in a chunk, and after some chunks
def test_a_full_disk_gets_a_sentence_and_the_next_visitor_is_served(video, size):
    with files_limited_to(size):
        _, lines, error = watch(video)
    assert lines[-1] == error.message == "The server could not store the result. Its disk may be full."
    assert len(watch(video)[0]) == 41


def test_a_cache_folder_that_cannot_be_written_gets_a_sentence(video, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", video)  # a file, not a folder
    assert watch(video)[2].message == "The server could not store the result. Its disk may be full."


@pytest.mark.parametrize(
    ("limit", "value", "sentence"),
    [
        ("MAX_PIXELS", 160 * 96 - 1, "too large: 160x96"),
        ("MAX_HOURS", 2 / 3600, "longer than"),
        ("MAX_FRAMES", 81, "more than 81 frames"),
    ],
)
def test_limits_are_sentences(video, monkeypatch, limit, value, sentence):
    monkeypatch.setattr(app, limit, value)
    with pytest.raises(gr.Error, match=sentence):
        app.read_video_info(video)
