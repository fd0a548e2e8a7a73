"""The page: one HTML file with its style, script and data, which needs no network."""

import gzip
import html
import json
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from .load import Run
from .view import describe

_SCRIPTS = ("core.js", "filter.js", "curves.js", "group.js", "rollout.js", "main.js")


def render_page(run: Run) -> str:
    """
    Render the page of a run.

    The data is compressed and encoded in base64, so that no text in it can be interpreted as HTML. The script writes it to
    text nodes only. The content security policy of the page allows only this script, and no network requests.

    Args:
        run ([`Run`]):
            The run, see [`load_run`].

    Returns:
        `str`: HTML.
    """
    folder = files(__package__) / "page"
    style = (folder / "page.css").read_text(encoding="utf-8")
    parts = [(folder / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"
    index, texts = describe(run)
    values = {
        "title": html.escape(f"{run.name}: rollouts"),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "index": _pack(index),
        "texts": _pack(texts),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    pieces = page.split("{{")
    return pieces[0] + "".join(values[piece.split("}}")[0]] + piece.split("}}", 1)[1] for piece in pieces[1:])


def write_page(run: Run, path: str | Path) -> int:
    """
    Write the page of a run.

    Args:
        run ([`Run`]):
            The run, see [`load_run`].
        path (`str` or `Path`):
            Path of the HTML file. Its folder is created.

    Returns:
        `int`: Size of the file in bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(render_page(run).encode("utf-8"))


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode('utf-8')).digest()).decode()}"


def _pack(data: Any) -> str:
    # ASCII, because a passage may hold lone surrogates, which UTF-8 cannot encode
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).encode("ascii")
    return b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii")
