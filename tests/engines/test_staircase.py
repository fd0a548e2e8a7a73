"""Rows of different lengths are read in passes without padding."""

import pytest
import torch
from transformers import DynamicCache

from helpers.layer_kinds import STATES, make_tiny
from tspo_trl.engines.kv_cache import new_cache
from tspo_trl.engines.layers import state_layers
from tspo_trl.engines.states import staircase


@pytest.mark.parametrize("unread", [[5], [4, 4, 4], [9, 7, 7, 2], [12, 11, 10, 1, 1], [3, 2, 1]])
def test_each_row_reads_its_own_tokens_and_all_end_together(unread):
    width = 20
    columns = [[] for _ in unread]
    end = width - unread[0]
    for rows, stop in staircase(unread, width):
        for row in range(rows):
            columns[row] += range(end, stop)
        end = stop
    assert columns == [list(range(width - count, width)) for count in unread]
    assert len(staircase(unread, width)) == len(set(unread))


@torch.no_grad()
@pytest.mark.parametrize("name", STATES)
def test_states_of_rows_are_those_of_each_row_alone(name):
    model = make_tiny(STATES[name], 100)
    ids = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    cache, end = new_cache(model), 0
    argument = "cache_params" if name == "mamba2" else "past_key_values"
    for layer in cache.layers:
        layer.rows = 3
    for rows, stop in staircase([9, 6, 2], 9):
        for layer in state_layers(cache):
            layer.restrict_states(rows, 3)
        mask = torch.arange(stop) >= torch.tensor([0, 3, 7])[:rows, None]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, end:stop]
        options = {} if name == "mamba2" else {"position_ids": positions}
        model(ids[:rows, end:stop], attention_mask=mask.long(), use_cache=True, **{argument: cache}, **options)
        end = stop
    for row, count in enumerate([9, 6, 2]):
        alone = DynamicCache(config=model.config)
        model(input_ids=ids[row : row + 1, 9 - count :], use_cache=True, **{argument: alone})
        for layer, expected in zip(cache.layers, alone.layers, strict=True):
            for part in ("conv_states", "recurrent_states"):
                for index, state in getattr(expected, part, {}).items():
                    if state is not None:
                        torch.testing.assert_close(getattr(layer, part)[index][row], state[0], atol=1e-4, rtol=1e-4)
