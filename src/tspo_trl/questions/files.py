"""Files of questions: their formats, and the place of an error in a file."""

from itertools import islice
from pathlib import Path

from .json_files import read_json

#: The ending of a file and the loader of `datasets` that reads it.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def file_format(file: str | Path) -> str | None:
    """
    The loader of `datasets` for a file, by its ending.

    Args:
        file (`str` or `Path`):
            A path or a URL, with or without the ending of compression `.gz`.

    Returns:
        `str` or `None`: `"json"`, `"csv"`, `"parquet"`, or `None` for anything else.
    """
    return FORMATS.get(Path(str(file).removesuffix(".gz")).suffix.lower())


def row_of_file(file: str, index: int) -> str:
    """
    The name of a row of a file in error messages.

    Args:
        file (`str`):
            Path of the file.
        index (`int`):
            Number of the row, from 0. A negative number stands for the whole file.

    Returns:
        `str`: The file with the line from 1 (JSONL), or with the row from 0.
    """
    if index < 0:
        return file
    if file_format(file) == "json" and Path(file).is_file():
        place, _ = next(islice(read_json(file, file), index, None))
        return f"{file}, {place}"
    return f"{file}, row {index} (from 0)"


def explain_file(file: str, kind: str, error: BaseException) -> str:
    """
    Explain why a file could not be read.

    Args:
        file (`str`):
            Path of the file.
        kind (`str`):
            Its format, see [`file_format`].
        error (`BaseException`):
            Exception raised by `datasets`.

    Returns:
        `str`: A message that names the file and, where it can be found, the line or row.
    """
    reason = root_cause(error)
    no_rows = "corresponds to no data" in str(error) or "BatchSize must be greater than 0" in str(reason)
    if no_rows or isinstance(error, StopIteration):
        return f"{file} has no rows."
    if str(reason).startswith(file):
        return str(reason)
    return f"{file} cannot be read as {kind}: {str(reason).strip() or repr(reason)}"


def root_cause(error: BaseException) -> BaseException:
    """
    The first of a chain of exceptions.

    Args:
        error (`BaseException`):
            The last of them.

    Returns:
        `BaseException`: The exception from which it came.
    """
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return error
