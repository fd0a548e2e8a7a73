"""The package as it is installed from its wheel, away from the repository."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from tspo_trl import read_rollouts
from tspo_trl.commands.main import COMMANDS

# The help of every command in one process: the heavy imports are paid once
SHOW_HELP = """
import contextlib
from tspo_trl.commands.main import COMMANDS, main
for command in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
"""


def run(*command, cwd, path=None):
    """Run a command in a folder, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")  # an old list of files could hide a missing one
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    run(*pip, *build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=folder)
    return target


@pytest.fixture
def python(installed, tmp_path):
    """Run Python outside the repository: the environment gives the dependencies, the wheel gives the package."""

    def run_python(*arguments):
        return run(sys.executable, *arguments, cwd=tmp_path, path=installed)

    place = run_python("-c", "import tspo_trl; print(tspo_trl.__file__)").strip()
    assert place == str(installed / "tspo_trl" / "__init__.py")
    return run_python


@pytest.mark.slow
def test_the_wheel_has_the_files_of_the_package(installed):
    def files(folder):
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in paths if path.suffix != ".pyc"}

    assert files(installed / "tspo_trl") == files(ROOT / "src" / "tspo_trl")


@pytest.mark.slow
def test_every_command_of_the_wheel_shows_its_help(installed, python, tmp_path):
    for shown in (
        python("-m", "tspo_trl", "--help"),
        run(installed / "bin" / "tspo", "--help", cwd=tmp_path, path=installed),
    ):
        assert all(text in shown for text in COMMANDS.values())
    shown = python("-c", SHOW_HELP)
    assert [command for command in COMMANDS if f"usage: tspo {command} " not in shown] == []


@pytest.mark.slow
def test_the_wheel_trains_on_the_demo(python, installed, policy_dir, tmp_path):
    """The configuration and the data of the demo come from the wheel; the model is another one."""
    options = {
        "config": installed / "tspo_trl" / "commands" / "demo.yaml",
        "dataset_name": "demo",
        "model_name_or_path": policy_dir,
        "output_dir": "run",
        "max_steps": 2,
        "max_train_questions": 8,
        "max_eval_questions": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "disable_tqdm": "true",
    }
    shown = python(
        "-m", "tspo_trl", "train", *(part for option in options.items() for part in (f"--{option[0]}", option[1]))
    )
    assert "Held-out questions (2, 4 sampled rollouts each)" in shown
    folder = tmp_path / "run"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 2]
    assert len(list(read_rollouts(folder / "trajectories" / "train-rank000.jsonl"))) == 2 * 8
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "heldout.jsonl").read_text().splitlines()) > 2
    python("-m", "tspo_trl", "inspect", "run")
    assert (folder / "inspect.html").read_text(encoding="utf-8").startswith("<!doctype html>")
