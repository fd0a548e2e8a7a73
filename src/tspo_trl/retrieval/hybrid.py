"""Several retrievers joined into one, by the ranks of their passages."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from .base import Passage, Retriever
from .passages import describe_type
from .results import Outcome, all_results, check_retriever, is_integer, is_number, read_arguments, search_queries


class HybridRetriever:
    """
    Joins the results of several retrievers by reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009): the score of a
    passage is the sum of `weight / (rank_constant + rank)` over the retrievers that find it, with ranks from 1.

    The retrievers search at the same time, each in its own thread. They must search the same corpus: passages are the same if
    their ids are or, without ids, if their titles and texts are.

    Args:
        retrievers (`Sequence[Retriever]`):
            Two or more retrievers, for instance a [`BM25Retriever`] and a [`DenseRetriever`].
        weights (`Sequence[float]`, *optional*):
            Positive weights of the retrievers. Defaults to 1 for each.
        rank_constant (`int`, *optional*, defaults to `60`):
            Constant of the fusion. The larger it is, the less the first ranks stand out.
        depth (`int`, *optional*, defaults to `50`):
            Number of passages that each retriever is asked for, or `k` if that is more.

    Raises:
        `ValueError`: If there are fewer than two retrievers, or an option has an invalid value.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        *,
        weights: Sequence[float] | None = None,
        rank_constant: int = 60,
        depth: int = 50,
    ):
        if not isinstance(retrievers, Sequence) or isinstance(retrievers, str):
            raise ValueError(f"`retrievers` must be a list of retrievers, got {describe_type(retrievers)}.")
        if len(retrievers) < 2:
            raise ValueError(f"`retrievers` must have at least two retrievers, got {len(retrievers)}.")
        for retriever in retrievers:
            check_retriever(retriever)
        weights = [1.0] * len(retrievers) if weights is None else list(weights)
        positive = all(is_number(weight) and 0 < weight < float("inf") for weight in weights)
        if len(weights) != len(retrievers) or not positive:
            raise ValueError(
                f"`weights` must have a positive number for each of {len(retrievers)} retrievers, got {weights}."
            )
        if not is_number(rank_constant) or not 1 <= rank_constant < float("inf"):
            raise ValueError(f"`rank_constant` must be at least 1, got {rank_constant!r}.")
        if not is_integer(depth) or depth < 1:
            raise ValueError(f"`depth` must be an integer of at least 1, got {depth!r}.")
        self.retrievers, self.weights = list(retrievers), weights
        self.rank_constant, self.depth = rank_constant, depth

    @property
    def fingerprint(self) -> str | None:
        """A string that changes with the results. `None` if one of the retrievers has none."""
        parts = [getattr(retriever, "fingerprint", None) for retriever in self.retrievers]
        if not all(isinstance(part, str) for part in parts):
            return None
        return f"hybrid {self.rank_constant} {self.depth} {self.weights} " + " + ".join(map(str, parts))

    def __repr__(self) -> str:
        return f"HybridRetriever({self.retrievers!r})"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once, with all retrievers.

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                Maximum number of passages for each query, at least 1.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first. Equal scores are in the order of the first
                retriever, then of the second.
        """
        return all_results(self._search_each(queries, k))

    def _search_each(self, queries: Sequence[str], k: int) -> list[Outcome]:
        """For each query its passages, or the failure of the first retriever that failed."""
        queries, k = read_arguments(queries, k)
        if not queries:
            return []
        with ThreadPoolExecutor(len(self.retrievers)) as executor:
            searches = [
                executor.submit(search_queries, retriever, queries, max(k, self.depth)) for retriever in self.retrievers
            ]
            found = [search.result() for search in searches]
        return [self._join(outcomes, k) for outcomes in zip(*found, strict=True)]

    def _join(self, outcomes: Sequence[Outcome], k: int) -> Outcome:
        scores: dict[tuple[str, ...], float] = {}
        passages: dict[tuple[str, ...], Passage] = {}
        for outcome, weight in zip(outcomes, self.weights, strict=True):
            if isinstance(outcome, Exception):
                return outcome
            for rank, passage in enumerate(outcome, start=1):
                key = (passage.id,) if passage.id else (passage.title, passage.text)
                scores[key] = scores.get(key, 0.0) + weight / (self.rank_constant + rank)
                passages.setdefault(key, passage)
        best = sorted(scores, key=lambda key: -scores[key])[:k]  # a stable sort
        return [replace(passages[key], score=scores[key]) for key in best]
