"""What a person sees who starts the app: which model runs, or a sentence that says why none does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import app

ROOT = Path(__file__).parents[1]
START = "import time, app; print(app.DETECTOR.source, app.DETECTOR.id2label[0], app.MODEL_NOTE, sep='|')"


def start(tmp_path, **env):
    """Import the app in a fresh process that has an empty Hub cache and no network to speak of."""
    clean = {key: value for key, value in os.environ.items() if key not in ("MODEL_ID", "HF_HUB_OFFLINE")}
    # A port on which nothing listens refuses at once, as a machine without a network does.
    clean |= {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9", **env}
    return subprocess.run(
        [sys.executable, "-c", START], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120
    )


def test_without_a_network_the_shipped_detector_starts_and_says_so(tmp_path):
    begun = time.monotonic()
    result = start(tmp_path)
    assert result.returncode == 0, result.stderr
    source, first_label, note = result.stdout.strip().splitlines()[-1].split("|")
    assert Path(source) == app.SHIPPED_MODEL
    assert first_label == "circle"
    for words in (app.DEFAULT_MODEL_ID, "could not be loaded", "circle, square, triangle", "MODEL_ID"):
        assert words in note
        assert words in result.stderr
    assert len(result.stderr.splitlines()) < 6, result.stderr  # no pages of retries
    assert time.monotonic() - begun < 60


def test_a_local_folder_is_loaded_and_has_no_note(tmp_path):
    result = start(tmp_path, MODEL_ID=str(app.SHIPPED_MODEL))
    assert result.stdout.strip().splitlines()[-1] == f"{app.SHIPPED_MODEL}|circle|"


def test_a_model_id_that_cannot_be_loaded_is_an_error_with_a_sentence(tmp_path):
    result = start(tmp_path, MODEL_ID="nobody/no-such-model")
    assert result.returncode == 1
    assert "The model 'nobody/no-such-model' in MODEL_ID cannot be used" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_is_no_rt_detr_is_an_error_with_a_sentence(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    result = start(tmp_path, MODEL_ID=str(folder))
    assert result.returncode == 1
    assert "'bert' model, not an RT-DETR detector" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_ffmpeg_the_app_says_what_is_missing(tmp_path):
    result = start(tmp_path, MODEL_ID=str(app.SHIPPED_MODEL), PATH=str(tmp_path))
    assert result.returncode == 1
    assert "This app needs ffmpeg and ffprobe" in result.stderr
    assert "Traceback" not in result.stderr
