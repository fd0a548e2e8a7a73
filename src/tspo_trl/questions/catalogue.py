"""The seven question-answering benchmarks of Search-R1 and TSPO, by name."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from datasets import Dataset

from .load import load_questions

_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_DEV = "The test answers are not public: this is the dev split, which papers report as the test set."
_ORIGINAL_DEV = "This test split is the dev split of the original data set, whose test answers are not public."


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark and its place on the Hub.

    Args:
        name (`str`):
            Name in [`load_benchmark`].
        title (`str`):
            Name in papers.
        config (`str`):
            Configuration in the repository.
        split (`str`):
            Split that is evaluated.
        num_questions (`int`):
            Number of questions of the split, according to the table of the repository.
        repository (`str`, *optional*, defaults to `"RUC-NLPIR/FlashRAG_datasets"`):
            The data set on the Hub.
        note (`str`, *optional*, defaults to `""`):
            Note printed with the results.
    """

    name: str
    title: str
    config: str
    split: str
    num_questions: int
    repository: str = _FLASHRAG
    note: str = ""


#: The benchmarks by name. Splits are those that Search-R1 evaluates on: test where there is one, else dev.
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("nq", "NQ", "nq", "test", 3_610, note=_ORIGINAL_DEV),
        Benchmark("triviaqa", "TriviaQA", "triviaqa", "test", 11_313, note=_ORIGINAL_DEV),
        Benchmark("popqa", "PopQA", "popqa", "test", 14_267),
        Benchmark("hotpotqa", "HotpotQA", "hotpotqa", "dev", 7_405, note=_DEV),
        Benchmark("2wikimultihopqa", "2WikiMultihopQA", "2wikimultihopqa", "dev", 12_576, note=_DEV),
        Benchmark("musique", "MuSiQue", "musique", "dev", 2_417, note=_DEV),
        Benchmark("bamboogle", "Bamboogle", "bamboogle", "test", 125),
    )
}


def load_benchmark(
    name: str, *, max_questions: int | None = None, seed: int = 0, repository: str | Path | None = None
) -> Dataset:
    """
    Load one of the [`BENCHMARKS`] from the Hub.

    Args:
        name (`str`):
            `"nq"`, `"triviaqa"`, `"popqa"`, `"hotpotqa"`, `"2wikimultihopqa"`, `"musique"` or `"bamboogle"`, in lower or
            upper case.
        max_questions (`int`, *optional*):
            Number of questions to draw. Defaults to all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        repository (`str` or `Path`, *optional*):
            Another data set with the same layout, for instance a local folder with `nq/test.jsonl` and so on.

    Returns:
        [`~datasets.Dataset`]: See [`load_questions`]; `data_source` is the name.

    Raises:
        `ValueError`: If there is no such benchmark; the message suggests the nearest.
    """
    benchmark = BENCHMARKS.get(name.lower())
    if benchmark is None:
        near = get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no benchmark {name!r}, only {list(BENCHMARKS)}.{hint}")
    dataset = load_questions(
        benchmark.repository if repository is None else repository,
        name=benchmark.config,
        split=benchmark.split,
        max_questions=max_questions,
        seed=seed,
    )
    assert isinstance(dataset, Dataset)
    return dataset
