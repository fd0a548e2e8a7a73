"""Masks by position: windows and chunks count tokens, and padding between tokens does not matter."""

from threading import Thread

import pytest
import torch
from transformers import GptOssConfig, MistralConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_causal_mask_function,
)

from tspo_trl.engines.masks import SUPPORTED, allowed_by_position, first_visible, masks_by_position, reach


def random_masks(rows=40, columns=23):
    """Masks of rows with padding anywhere. The last column is a token."""
    mask = (
        torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.2, 1.0, rows)[:, None]
    )
    mask[:, -1] = True
    return mask


def functions(mask):
    left = (mask.cumsum(dim=1) == 0).sum(dim=1)
    return [causal_mask_function, sliding_window_causal_mask_function(4), chunked_causal_mask_function(5, left)]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["causal", "sliding window", "chunks"])
def test_a_row_with_padding_is_masked_like_its_tokens_alone(kind):
    mask = random_masks()
    allowed = allowed_by_position(functions(mask)[kind], mask, 9)
    assert allowed.shape == (40, 1, 9, 23)
    for row, of_row in zip(mask, allowed[:, 0], strict=True):
        assert not of_row[:, ~row].any()
        alone = row[row][None]
        expected = allowed_by_position(functions(alone)[kind], alone, int(row[-9:].sum()))[0, 0]
        assert torch.equal(of_row[row[-9:]][:, row], expected)


def test_without_padding_between_tokens_masks_are_those_of_transformers():
    mask = torch.arange(23) >= torch.arange(12)[:, None]
    for function in functions(mask):
        rows, queries, keys = torch.arange(12)[:, None, None, None], torch.arange(14, 23)[:, None], torch.arange(23)
        expected = function(rows, rows, queries, keys) & mask[:, None, None]
        assert torch.equal(
            allowed_by_position(function, mask, 9)[mask[:, 14:][:, None]], expected[mask[:, 14:][:, None]]
        )


@pytest.mark.parametrize("attention", SUPPORTED)
def test_models_get_these_masks_inside_the_context_only(attention):
    config = MistralConfig(sliding_window=4) if attention == "sdpa" else GptOssConfig(sliding_window=4)
    config._attn_implementation = attention
    mask, embeddings = random_masks(), torch.zeros(40, 23, 1)

    def create(with_padding=True):
        return create_sliding_window_causal_mask(config, embeddings, mask if with_padding else None, None)

    before, without_padding = create(), create(with_padding=False)
    with masks_by_position() as masks:
        inside, elsewhere = create(), []
        thread = Thread(target=lambda: elsewhere.append(create()))
        thread.start()
        thread.join()
        assert masks.local
        assert torch.equal(create(with_padding=False), without_padding)
    assert torch.equal(create(), before)
    assert torch.equal(elsewhere[0], before)
    allowed = allowed_by_position(sliding_window_causal_mask_function(4), mask, 23)
    assert torch.equal(inside if attention == "sdpa" else inside == 0, allowed)
    assert not torch.equal(inside, before)


def test_full_attention_is_not_local_and_errors_restore_the_functions():
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    seen = []

    def fail():
        with masks_by_position() as masks:
            seen.append(masks)
            config = MistralConfig(attn_implementation="sdpa")
            create_causal_mask(config, torch.zeros(40, 23, 1), random_masks(), None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not seen[0].local
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before


@pytest.mark.parametrize("window", [1, 3, 8, 40])
def test_first_visible_column_is_that_of_the_widest_window(window):
    mask = random_masks()[20:]
    for new in range(1, 12):
        whole = torch.cat([mask, torch.ones(len(mask), new, dtype=torch.bool)], dim=1)
        allowed = allowed_by_position(sliding_window_causal_mask_function(window), whole, 1)[:, 0, 0]
        first = first_visible(reach(mask), window, new)
        assert first == int(allowed.any(dim=0).nonzero()[0])
        sliced = allowed_by_position(sliding_window_causal_mask_function(window), whole, 1, first)
        assert torch.equal(sliced[:, 0, 0], allowed[:, first:])
