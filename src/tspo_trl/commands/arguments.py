"""The arguments for questions and passages that the commands of training share, as a dataclass for TRL's parser."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments

from ..retrieval import BM25Retriever, Retriever, open_retriever
from ..retrieval.base import TRIAL_QUERY
from .options import BACKEND, BACKENDS, ENCODER, LANGUAGE, RETRIEVER_OPTIONS, parse_columns


@dataclass
class DataArguments(ScriptArguments):
    """
    Arguments for the questions and the passages, in addition to those of [`~trl.ScriptArguments`].

    Args:
        dataset_name (`str` or `list[str]`, *optional*):
            Data sets on the Hub, files or folders, see [`load_questions`], or `"demo"`. Several are mixed.
        dataset_columns (`dict` or `str`, *optional*):
            Names of the columns in the data set, for instance `{"question": "query", "golden_answers": "answers.text"}`.
        corpus (`str`, *optional*):
            JSONL file of passages. The demo has its own.
        index (`str`, *optional*):
            Saved index, used instead of `corpus`; with the backend `"lucene"`, a path or the name of a prebuilt index. See
            [`~retrieval.open_retriever`].
        retriever_url (`str`, *optional*):
            Address of a retrieval server, used instead of `corpus`, for instance of `tspo serve`.
        retriever_backend (`str`, *optional*, defaults to `"bm25"`):
            `"bm25"`, `"rank_bm25"`, `"lucene"`, `"dense"` or `"hybrid"`.
        retriever_language (`str`, *optional*):
            Language of BM25's stop words and stemmer, or `"none"`. Defaults to English, or to the language of the index.
        retriever_encoder (`str`, *optional*):
            Embedding model of the backends `"dense"` and `"hybrid"`. Defaults to the model that the index names.
    """

    dataset_name: list[str] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "data sets on the Hub, files or folders, or 'demo'; several are mixed",
            "aliases": ["--dataset"],
        },
    )
    dataset_columns: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "names of the columns, for instance golden_answers=answers.text; or a JSON object",
            "aliases": ["--columns"],
        },
    )
    corpus: str | None = field(default=None, metadata={"help": RETRIEVER_OPTIONS["corpus"]})
    index: str | None = field(default=None, metadata={"help": RETRIEVER_OPTIONS["index"]})
    retriever_url: str | None = field(default=None, metadata={"help": RETRIEVER_OPTIONS["retriever_url"]})
    retriever_backend: str = field(default="bm25", metadata={"help": f"{BACKEND}: {', '.join(BACKENDS)}"})
    retriever_language: str | None = field(default=None, metadata={"help": LANGUAGE})
    retriever_encoder: str | None = field(default=None, metadata={"help": ENCODER, "aliases": ["--encoder"]})

    def __post_init__(self):
        if isinstance(self.dataset_name, list) and len(self.dataset_name) == 1:
            self.dataset_name = self.dataset_name[0]  # type: ignore[assignment]
        if isinstance(self.dataset_columns, str):
            self.dataset_columns = [self.dataset_columns]  # type: ignore[assignment]
        if isinstance(self.dataset_columns, list):
            try:
                self.dataset_columns = parse_columns(self.dataset_columns)
            except ValueError as error:
                raise ValueError(f"`dataset_columns` must be {error}") from error


def make_output_dir(path: str | None) -> None:
    """Make the folder of a run, so that one that cannot be written is reported before anything is loaded."""
    folder = Path(path or ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise type(error)(f"`output_dir`: the folder {path!r} cannot be made: {error.strerror}.") from error
    if not is_writable:
        raise PermissionError(f"`output_dir`: the folder {path!r} cannot be written.")


def load_retriever(script_args: DataArguments, logged: bool) -> Retriever | None:
    """The retriever; `None` repeats a run from its retrieval log."""
    options = {"corpus": script_args.corpus, "index": script_args.index, "url": script_args.retriever_url}
    if any(options.values()):
        retriever = open_retriever(
            **options,
            backend=script_args.retriever_backend,
            language=script_args.retriever_language,
            encoder=script_args.retriever_encoder,
        )
        if not isinstance(retriever, BM25Retriever):
            retriever.search([TRIAL_QUERY], k=1)  # fail now if the server does not answer, not after the warm start
        return retriever
    if logged:
        return None
    raise ValueError("Passages are required: --corpus, a saved --index, or --retriever_url, the address of a server.")
