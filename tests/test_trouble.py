"""What goes wrong on a server: a sentence for the visitor, a traceback in the log, and the next one is served."""

import contextlib
import errno
import os
import resource
import subprocess
from types import SimpleNamespace

import cv2
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
        for values in app.start(video, conf_threshold, request, analysed=app.EVERY_FRAME, lines={}):
            lines.append(values.get(app.status))
            if isinstance(chunk := values.get(app.player), str):
                pictures.extend(read_chunks([chunk]).pictures)
    except gr.Error as error:
        return pictures, [line for line in lines if isinstance(line, str)], error
    return pictures, [line for line in lines if isinstance(line, str)], None


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.0 GB, other allocations: 1.1 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
NO_MEMORY_IN_OPENCV = cv2.error("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate ...")


def with_memory_for(frames, forward, error=OUT_OF_MEMORY[0]):
    """A forward pass that runs out of memory with more frames than that."""

    def limited(*args, **kwargs):
        if len(kwargs["pixel_values"]) > frames:
            raise error
        return forward(*args, **kwargs)

    return limited


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "mps", "cublas"])
def test_a_batch_that_does_not_fit_into_memory_is_tried_in_smaller_parts(error, monkeypatch):
    frames = list(np.random.default_rng(0).integers(0, 255, (7, 90, 160, 3), np.uint8))
    expected = [app.DETECTOR([frame])[0] for frame in frames]
    monkeypatch.setattr(app.DETECTOR.model, "forward", with_memory_for(2, app.DETECTOR.model.forward, error))
    for found, alone in zip(app.DETECTOR(frames), expected, strict=True):
        np.testing.assert_allclose(found.xyxy, alone.xyxy, atol=1e-4)
        np.testing.assert_allclose(found.confidence, alone.confidence, atol=1e-4)
        np.testing.assert_array_equal(found.class_id, alone.class_id)


def test_without_any_memory_there_is_a_sentence_and_the_next_visitor_is_served(video, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(app.DETECTOR.model, "forward", with_memory_for(0, app.DETECTOR.model.forward))
        pictures, lines, error = watch(video)
    assert not pictures
    assert error.message == "The server is out of memory. Try again in a minute."
    assert lines[-1] == f"> {error.message}"
    assert len(watch(video)[0]) == 41


class ProcessEndsError(Exception):
    """In place of the end of the process."""


def end(code):
    raise ProcessEndsError(code)


def test_after_an_error_that_leaves_cuda_unusable_the_process_ends_with_a_line_in_the_log(monkeypatch, caplog):
    passes = []

    def failing(*_, **__):
        passes.append(1)
        raise ILLEGAL

    monkeypatch.setattr(app.DETECTOR, "_forward_pass", failing)
    monkeypatch.setattr(app.os, "_exit", end)
    monkeypatch.setattr(app, "HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "synchronize", failing)
    with pytest.raises(ProcessEndsError, match="1"):
        app.DETECTOR([np.zeros((90, 160, 3), np.uint8)] * 6)
    assert len(passes) <= 2 + app.DETECTOR.passes_at_once, "it is not tried again"
    assert "CUDA is lost" in caplog.text and "illegal memory access" in caplog.text


def test_an_error_that_mentions_memory_is_not_out_of_memory():
    assert app.user_facing_error(ILLEGAL).title == "Error"


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), NO_MEMORY_IN_OPENCV])
def test_without_memory_elsewhere_the_sentence_is_the_same(error):
    assert app.user_facing_error(error).title == "Out of memory"


def test_a_file_with_memory_in_its_name_is_not_out_of_memory():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "memory.mp4")
    failed = subprocess.CalledProcessError(1, ["ffmpeg", "memory.mp4"])
    assert {app.user_facing_error(error).title for error in (full, failed)} == {"Disk full"}


def test_what_was_made_before_something_failed_is_not_lost(video, monkeypatch, caplog):
    detect, calls = app.DETECTOR._forward_pass, []

    def failing(frames):
        calls.append(frames)
        if sum(map(len, calls)) > 30:  # in the second chunk
            raise RuntimeError(f"cannot read {video}")
        return detect(frames)

    monkeypatch.setattr(app.DETECTOR, "_forward_pass", failing)
    pictures, lines, error = watch(video)
    assert len(pictures) == 30
    assert lines[-1] == f"> {error.message}"
    assert error.message.startswith("Something went wrong on the server; its log has the details.")
    assert error.message.endswith("The first 2 seconds are complete. Press “Run again” to resume from there.")
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


@pytest.mark.parametrize("size", [0, 1_000])  # the first chunk fails as it is opened, or as it is written
def test_a_full_disk_gets_a_sentence_and_the_next_visitor_is_served(video, size):
    with files_limited_to(size):
        _, lines, error = watch(video)
    assert error.message == "The server could not store the result. Its disk may be full."
    assert lines[-1] == f"> {error.message}"
    assert len(watch(video)[0]) == 41


def test_a_disk_that_fills_up_after_the_stream_costs_only_the_files(video, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(app, "join_chunks", fail)
    pictures, lines, error = watch(video)
    assert len(pictures) == 41
    assert error.message == "The server could not store the result. Its disk may be full."
    assert lines[-1] == f"> {error.message}"


@pytest.mark.parametrize(
    ("total", "free", "is_refused"), [(1000, 49, True), (1000, 51, False), (1 << 40, 2 << 30, False)]
)
def test_on_an_almost_full_disk_a_new_run_is_refused_with_a_sentence(total, free, is_refused, video, monkeypatch):
    monkeypatch.setattr(app.shutil, "disk_usage", lambda _: SimpleNamespace(total=total, free=free))
    _, _, error = watch(video)
    assert (error is not None) == is_refused
    assert not error or error.message == "The disk of the server is almost full. Try again in an hour."


def test_files_go_an_hour_after_their_last_use(video):
    assert app.demo.delete_cache == (600, 3600)
    before = os.stat(video)
    watch(video)
    after = os.stat(video)
    assert after.st_ctime_ns > before.st_ctime_ns, "Gradio deletes files by their ctime"
    assert after.st_mtime_ns == before.st_mtime_ns, "it is the same video"
