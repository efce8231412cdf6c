"""What a person sees who starts the app: which model runs, or a sentence that says why none does."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import changed_checkpoint
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

import app

ROOT = Path(__file__).parents[1]


def start(code, **env):
    """Run a program in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


def test_without_a_network_the_shipped_detector_starts_and_says_so():
    begun = time.monotonic()
    code = "import app; print(app.DETECTOR.name, app.DETECTOR.id2label[0], app.MODEL_NOTE, sep='|')"
    result = start(code, MODEL_ID="")
    assert result.returncode == 0, result.stderr
    source, first_label, note = result.stdout.strip().splitlines()[-1].split("|")
    assert source == app.SHIPPED_MODEL.name
    assert first_label == "circle"
    for words in (app.DEFAULT_CPU_MODEL_ID, "is unavailable", "circle, square, triangle", "MODEL_ID"):
        assert words in note
        assert words in result.stderr
    assert len(result.stderr.splitlines()) < 6, result.stderr  # no pages of retries
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_refuses_is_not_mistaken_for_a_missing_network(status):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        result = start("import app", MODEL_ID="", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
        hub.shutdown()
    assert result.returncode == 1
    assert f"The model '{app.DEFAULT_CPU_MODEL_ID}' cannot be downloaded" in result.stderr
    assert str(status) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_local_folder_is_loaded_and_has_no_note(monkeypatch):
    monkeypatch.setenv("MODEL_ID", str(app.SHIPPED_MODEL))
    detectors, note = app.load_detectors()
    (detector,) = detectors.values()
    assert (detector.name, detector.id2label[0], note) == (app.SHIPPED_MODEL.name, "circle", "")


def test_a_model_id_that_cannot_be_loaded_is_an_error_with_a_sentence(monkeypatch):
    monkeypatch.setenv("MODEL_ID", "nobody/no-such-model")
    with pytest.raises(SystemExit, match=r"^The model 'nobody/no-such-model' in MODEL_ID is unavailable: .*\.$"):
        app.load_detectors()


@pytest.mark.parametrize("model_type", ["bert", "rf_detr", "lw_detr"])
def test_a_model_of_another_family_is_an_error_with_a_sentence(model_type, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    monkeypatch.setenv("MODEL_ID", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"cannot be used: it is a '{model_type}' model. Known are .*DEIMv2$"):
        app.load_detectors()


@pytest.fixture
def cached_default(monkeypatch):
    """The default checkpoint for CPUs in the Hub's cache, as far as its files go: they are the shipped detector's."""
    monkeypatch.setenv("MODEL_ID", "")
    folder = Path(HF_HUB_CACHE, repo_folder_name(repo_id=app.DEFAULT_CPU_MODEL_ID, repo_type="model"))
    shutil.copytree(app.SHIPPED_MODEL, folder / "snapshots" / "0123")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    yield folder / "snapshots" / "0123"
    shutil.rmtree(folder)


def test_without_a_network_the_default_checkpoint_comes_from_the_cache(cached_default):
    detectors, note = app.load_detectors()
    assert (list(detectors), note) == ([app.DEFAULT_CPU_MODEL_ID], "")


def test_a_default_checkpoint_that_is_cached_but_broken_is_not_replaced(cached_default):
    (cached_default / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=f"^The model '{app.DEFAULT_CPU_MODEL_ID}' cannot be used: "):
        app.load_detectors()


def test_a_bug_does_not_look_like_a_missing_network(cached_default, monkeypatch):
    monkeypatch.setattr(app.AutoConfig, "from_pretrained", lambda *_, **__: {}["broken"])
    with pytest.raises(KeyError, match="broken"):
        app.load_detectors()


def test_without_ffmpeg_the_app_says_what_is_missing(tmp_path):
    result = start("import app", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "This app requires ffmpeg and ffprobe" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_bundled_ffmpeg_comes_first_in_the_path(monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])
    app.prefer_bundled_ffmpeg()
    assert "imageio_ffmpeg" in shutil.which("ffmpeg")
    version = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("ffmpeg version")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("size", {"shortest_edge": 256, "longest_edge": 512}), ("do_resize", False), ("do_pad", True), ("resample", 3),
     ("image_processor_type", "DetrImageProcessor")],
)  # fmt: skip
def test_an_unsupported_image_processor_is_an_error_with_the_settings_name(setting, value, tmp_path):
    folder = changed_checkpoint(tmp_path / "model", "preprocessor_config.json", **{setting: value})
    with pytest.raises(ValueError, match=f"must have .*{setting}"):
        app.Detector(folder, "changed")


FIVE = ["circle", "square", "triangle", "star", "cross"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("id2label", dict(enumerate(FIVE, 1))), ("id2label", dict(enumerate(FIVE[:3]))), ("id2label", None),
     ("anchor_image_size", [640, 640]), ("anchor_image_size", 256), ("use_focal_loss", False)],
)  # fmt: skip
def test_a_checkpoint_that_cannot_work_is_an_error_with_the_settings_name(setting, value, tmp_path):
    folder = changed_checkpoint(tmp_path / "model", "config.json", **{setting: value})
    with pytest.raises(ValueError, match=setting):
        app.Detector(folder, "changed")


def test_two_classes_with_one_name_are_told_apart(tmp_path):
    labels = dict(enumerate(["star", "cross", "star", "star", "square"]))
    folder = changed_checkpoint(tmp_path / "model", "config.json", id2label=labels)
    found = app.Detector(folder, "changed").id2label
    assert found == dict(enumerate(["star", "cross", "star (2)", "star (3)", "square"]))


def test_several_models_are_loaded_and_the_first_is_the_default(monkeypatch, tmp_path):
    other = changed_checkpoint(tmp_path / app.SHIPPED_MODEL.name, "config.json")
    monkeypatch.setenv("MODEL_ID", f"{app.SHIPPED_MODEL}, {other},")
    detectors, note = app.load_detectors()
    name = app.SHIPPED_MODEL.name
    assert ([*detectors], note) == ([name, f"{name} (2)"], "")
    assert all(detector.name == key for key, detector in detectors.items())


def test_one_of_several_models_that_cannot_be_loaded_is_an_error_with_its_name(monkeypatch):
    monkeypatch.setenv("MODEL_ID", f"{app.SHIPPED_MODEL},nobody/no-such-model")
    with pytest.raises(SystemExit, match=r"^The model 'nobody/no-such-model' in MODEL_ID is unavailable: .*\.$"):
        app.load_detectors()


def test_an_error_at_exit_does_not_abort_the_interpreter(tmp_path):
    """A run is in progress in threads when the main thread ends with an error."""
    path = app.EXAMPLES / "bouncing-shapes.mp4"
    code = f"import app; updates = app.stream_object_detection({str(path)!r}, 0.3); next(updates); raise SystemExit(3)"
    result = start(code, TMPDIR=str(tmp_path))
    assert result.returncode == 3
    assert "terminate called" not in result.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Python cannot restrict the cores here")
@pytest.mark.parametrize(("code", "cores"), [("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", 1),
                                             ("cv2.getNumberOfCPUs = lambda: 64", 16)])  # fmt: skip
def test_only_the_cores_of_this_process_are_used_and_at_most_16(code, cores):
    result = start(f"import cv2, os; {code}; import video; print(video.CPU_COUNT)")
    assert result.stdout.strip() == str(cores)


def test_a_quota_of_one_core_is_one_core(tmp_path):
    mount = "mount -t tmpfs none /sys/fs/cgroup && echo 100000 100000 > /sys/fs/cgroup/cpu.max"
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*inside, mount], check=False).returncode:
        pytest.skip("no namespaces here")
    command = f"{mount} && {sys.executable} -c 'import video; print(video.CPU_COUNT)'"
    result = subprocess.run([*inside, command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


@pytest.fixture
def example_server(monkeypatch):
    """A server in place of the address of the street videos. Returns what it was asked for, and what it can send."""
    asked, files = [], {}

    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            asked.append(name)
            content, length, pause = files.get(name) or (b"", None, 0)
            if length is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            with contextlib.suppress(OSError):
                for start in range(0, len(content), 1000):
                    self.wfile.write(content[start : start + 1000])
                    time.sleep(pause)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(app, "STREET_VIDEOS", f"http://127.0.0.1:{server.server_port}/videos")
        yield asked, files
        server.shutdown()


def test_a_model_that_knows_people_has_street_examples_that_are_fetched_once(example_server, monkeypatch, tmp_path):
    asked, files = example_server
    monkeypatch.setattr(app, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(app, "MAX_EXAMPLE_SECONDS", 2)
    monkeypatch.setattr(app, "MAX_EXAMPLE_BYTES", 100_000)
    monkeypatch.setattr(app, "STREET_EXAMPLES", ["good.mp4", "missing.mp4", "large.mp4", "slow.mp4", "broken.mp4"])
    monkeypatch.setattr(app.DETECTOR, "id2label", {0: "person", 1: "star"})
    video = bytes(30_000)
    files["good.mp4"] = (video, len(video), 0)
    files["large.mp4"] = (bytes(200_000), 200_000, 0)
    files["slow.mp4"] = (video, len(video), 0.2)
    files["broken.mp4"] = (video, 2 * len(video), 0)
    begun = time.monotonic()
    (path,) = app.example_videos()
    assert time.monotonic() - begun < 5
    assert Path(path).name == "good.mp4"
    assert Path(path).read_bytes() == video
    assert sorted(asked) == sorted(app.STREET_EXAMPLES)
    assert app.example_videos() == [path]
    assert asked.count("good.mp4") == 1
    assert [file.name for file in Path(path).parent.iterdir()] == ["good.mp4"]


def test_without_a_network_or_for_other_labels_there_are_no_examples(monkeypatch, tmp_path):
    assert len(app.example_videos()) == 3
    monkeypatch.setattr(app, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(app, "STREET_VIDEOS", "http://127.0.0.1:9")  # where nothing listens
    for label in ("person", "pore"):
        monkeypatch.setattr(app.DETECTOR, "id2label", {0: label})
        assert app.example_videos() == []
