"""Continuous batching with a small cache."""

from dataclasses import fields

from transformers import ContinuousBatchingConfig

#: Pages were called blocks before transformers 5.18
_PAGE_SIZE = "page_size" if "page_size" in {field.name for field in fields(ContinuousBatchingConfig)} else "block_size"
#: Arguments of `ContinuousBatchingConfig`
SMALL_CACHE = {_PAGE_SIZE: 32, "num_blocks": 64, "max_batch_tokens": 256}
