"""The autocast of mixed precision, opened around the turns of a round."""

from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig

from tspo_trl.engines.static import TransformersEngine
from tspo_trl.rollout.tags import TagProtocol

BF16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


class Conversions(TorchDispatchMode):
    """Counts the conversions of each weight to another type, by the address of its data."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.of[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def mixed(policy_dir):
    """A model whose `forward` opens autocast, as `Accelerator.prepare` makes it."""
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval()
    model.forward = BF16()(model.forward)
    return model


def generate(model, tokenizer, world, autocast):
    config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=True, disable_compile=True
    )
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, config, TagProtocol.stop_strings, autocast)
    contexts = [tokenizer(str(q.row()["prompt"]))["input_ids"] for q in world.train_questions[:6]]
    torch.manual_seed(0)
    with engine.session(), Conversions() as conversions:
        for number, context in enumerate(contexts):
            engine.submit(number, context, 8)
        turns = dict(engine.collect(wait=True))
        turns |= {6 + row: turn for row, turn in enumerate(engine.generate(contexts, [8] * 6))}
    return turns, [conversions.of[weight.data_ptr()] for weight in model.parameters() if weight.ndim == 2]


def test_autocast_around_a_round_converts_weights_once_and_changes_no_bit(mixed, tokenizer, world):
    expected, for_every_token = generate(mixed, tokenizer, world, nullcontext)
    turns, once = generate(mixed, tokenizer, world, BF16)
    assert turns == expected  # tokens and log-probabilities
    assert set(once) == {2}  # two rounds
    assert min(for_every_token) > 4  # one for each forward
