"""Mixing data sets, and drawing a subset."""

import logging
import random
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice

from datasets import Dataset, IterableDataset, Value, concatenate_datasets, interleave_datasets

from .rows import FEATURES, AnyDataset

logger = logging.getLogger(__name__)


def mix(parts: list[AnyDataset]) -> AnyDataset:
    """
    Mix data sets: concatenate them or, if one is a stream, interleave them until all are exhausted.

    Args:
        parts (`list` of [`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Data sets of questions.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The mixed data set. Columns with different types are left
        out. Concatenated rows have `None` in columns that their source lacks; a stream has the columns common to all.
    """
    streamed = any(isinstance(part, IterableDataset) for part in parts)
    columns = list(dict.fromkeys(column for part in parts for column in part.features or FEATURES))
    if streamed:
        columns = [column for column in columns if all(column in (part.features or FEATURES) for part in parts)]
    unlike = []
    for column in columns:
        kinds = {str(part.features[column]) for part in parts if part.features is not None and column in part.features}
        if len(kinds - {str(Value("null"))}) > 1:
            unlike.append(column)
    if unlike:
        logger.warning("The columns %s are left out: they have different types in the sources.", unlike)
    kept = [column for column in columns if column not in unlike]
    parts = [
        part.select_columns([column for column in kept if column in (part.features or FEATURES)]) for part in parts
    ]
    if not streamed:
        return concatenate_datasets(parts)
    return interleave_datasets(
        [part.to_iterable_dataset() if isinstance(part, Dataset) else part for part in parts],
        stopping_strategy="all_exhausted_without_replacement",
    )


def draw(dataset: AnyDataset, count: int, seed: int) -> AnyDataset:
    """
    Draw a subset, stratified by `data_source` if there is this column. With the same seed, a larger subset contains a smaller one.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Questions.
        count (`int`):
            Number of questions to draw.
        seed (`int`):
            Seed of the draw.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The questions drawn, in their order; of a stream, the
        first.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.take(count)
    if count >= len(dataset):
        return dataset
    strata: dict[str, list[int]] = defaultdict(list)
    sources = dataset["data_source"] if "data_source" in dataset.column_names else [""] * len(dataset)
    for index, name in enumerate(sources):
        strata[name].append(index)
    rows = []
    for name, size in _shares({name: len(indices) for name, indices in strata.items()}, count).items():
        rows += random.Random(f"{seed} {name}").sample(strata[name], len(strata[name]))[:size]
    return dataset.select(sorted(rows))


def _shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Divide `count` in proportion to sizes, by largest remainder; each gets at least one if `count` allows."""
    total = sum(sizes.values())
    shares = {name: count * size // total for name, size in sizes.items()}
    remainders = sorted(sizes, key=lambda name: (shares[name] > 0, -(count * sizes[name] % total), name))
    for name in islice(remainders, count - sum(shares.values())):
        shares[name] += 1
    return shares
