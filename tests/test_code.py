"""What the repository says of itself: code style, what is installed, README.md, and what a Space reads."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import files, version
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from videos import Kind

import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPACE = metadata_load(ROOT / "README.md")
CODE_BLOCKS = re.findall(r"^```\w+\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)


def requirements(path: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.mark.parametrize("command", ["check", "format --diff"])
def test_ruff_has_nothing_to_say(command):
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_package_that_the_app_imports_is_required_and_installed_in_that_range():
    required = requirements("requirements.txt")
    # Not `packages_distributions`: in Python 3.10, it overlooks packages without the optional top_level.txt.
    installed = {file.parts[0].removesuffix(".py") for name in required for file in files(name)}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {module.split(".")[0] for module in modules}:
                local = module in sys.stdlib_module_names or (ROOT / f"{module}.py").exists()
                assert local or module in installed, f"{path.name} imports {module}, which requirements.txt lacks"
    for name, requirement in required.items():
        assert requirement.specifier.contains(version(name)), f"{requirement} is not what is installed"


def test_the_readmes_test_command_is_what_ci_runs():
    assert "`.ci/run` runs the tests" in README
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_readme_starts_the_app_with_what_everybody_knows_and_with_one_command():
    first, second = CODE_BLOCKS[:2]
    assert first.splitlines()[1:] == ["pip install -r requirements.txt", "python app.py"]
    assert second == "sh .ci/setup && .venv/bin/python app.py\n"


def test_a_space_finds_all_that_it_needs_in_the_readmes_block():
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert SPACE["title"] and SPACE["emoji"] and {SPACE["colorFrom"], SPACE["colorTo"]} <= colors
    assert (SPACE["sdk"], SPACE["license"], SPACE["pinned"]) == ("gradio", "apache-2.0", False)
    assert (ROOT / SPACE["app_file"]).is_file()
    assert len(SPACE["short_description"]) <= 60, "a Space's page cuts it off there"
    assert SPACE["python_version"] in ("3.12.12", "3.10.13"), "ZeroGPU has no other"
    assert SPACE["models"] == [app.DEFAULT_MODEL_ID, app.DEFAULT_CPU_MODEL_ID]
    assert [entry.split()[0] for entry in SPACE["preload_from_hub"]] == SPACE["models"]


def test_the_tests_run_on_the_gradio_that_a_space_runs_on():
    assert SPACE["sdk_version"] in requirements("requirements.txt")["gradio"].specifier
    assert SPACE["sdk_version"] == version("gradio")


def test_every_file_that_the_readme_names_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    names = re.findall(r"`((?:tests|examples|\.ci)/[^`\s*]+|[\w-]+\.(?:py|txt))`", README)
    assert len(links) >= 4 and len(names) >= 5
    missing = [name for name in {*links, *names} if name != "tests/output" and not (ROOT / name).exists()]
    assert not missing


def test_the_readmes_lines_for_programs_work(server, tmp_path):
    (lines,) = [block for block in CODE_BLOCKS if "gradio_client" in block]
    path = Kind("street", frames=20).make(tmp_path)
    lines = lines.replace("http://127.0.0.1:7860", server).replace("street.mp4", str(path))
    results = {}
    exec(lines, results)
    assert Path(results["annotated"]).suffix == ".mp4"
    assert results["result"]["video"]["duration_seconds"] == pytest.approx(20 / 30, abs=0.001)


def test_the_readmes_lines_for_curl_work(server, tmp_path):
    (lines,) = [block for block in CODE_BLOCKS if "curl" in block]
    Kind("street", frames=20).make(tmp_path)
    lines = lines.replace("http://127.0.0.1:7860", server)
    answer = subprocess.run(["bash", "-ec", lines], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "event: complete" in answer.stdout, answer
    assert '"detections"' in answer.stdout
