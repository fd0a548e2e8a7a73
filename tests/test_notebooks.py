"""The notebooks run completely, and their committed outputs contain no warnings or local paths."""

import re

import nbformat
import pytest
from filelock import FileLock
from nbclient import NotebookClient

from helpers.paths import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = ["quickstart", "inspect_rollouts", "your_own_data"]
COMMITTED = [*NOTEBOOKS, "real_model"]  # the last needs the results of `make real`


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(output):
    """The text of an output, without pictures."""
    parts = [output.get("text", ""), *output.get("data", {}).values()]
    return "\n".join(part for part in parts if isinstance(part, str) and len(part) < 50_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_run(name, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed, if installed, prints the detected accelerator
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources)
    client.create_kernel_manager()
    with FileLock(
        tmp_path_factory.getbasetemp().parent / "kernel.lock"
    ):  # kernels that start at the same time may choose the same port
        client.start_new_kernel()
        client.start_new_kernel_client()
    client.execute()
    assert outputs(notebook)
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_notebooks_are_executed_and_clean(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert outputs(notebook)
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert not re.search(r"/(?:home|root|tmp|work|usr|Users)/|it/s\]|\[WARNING\]|Warning:", text(output))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000


@pytest.mark.parametrize("name", COMMITTED)
def test_links_of_the_notebooks_exist(name):
    source = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", source):
        assert (FOLDER / target).exists(), target
    for target in re.findall(r"`((?:docs|recipes)/[\w./-]*)`", source):
        assert (FOLDER.parent / target).exists(), target
