"""Whether a model continues from a kept cache as if it read everything at once. This is measured once for each model."""

from collections.abc import Callable
from statistics import median
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, PreTrainedModel

from .base import Generation
from .kv_cache import KeptCache, cache_name, new_cache
from .layers import state_layers, window_layers
from .masks import masks_by_position
from .sampling import sampling_by

#: Two rollouts of two turns: tokens of contexts and of observations, and budgets. The second one ends its first turn early.
#: States are compared after a pass of two tokens, because states may forget fast
CONTEXTS, OBSERVATIONS, BUDGETS = (11, 6), (1, 2), ((4, 2), (1, 1))
#: Relative error of the states of the first layer that has some. Half precision causes less than 1% there, because errors of
#: other layers do not matter yet; a state that is not continued causes 4% or more
STATE_ERROR = 0.02
#: Error of log-probabilities, in nats. It is much larger if the model does not attend to its context as it should
LOGPROB_ERROR = 0.3

_known: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


def why_inexact(model: PreTrainedModel, make_engine: Callable[[GenerationConfig], Any]) -> str | None:
    """
    Find out whether a model can continue from a kept cache, by generating a few tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, possibly wrapped by PEFT, for which [`new_cache`] makes a cache.
        make_engine (`Callable[[GenerationConfig], TransformersEngine]`):
            Makes an engine with this model.

    Returns:
        `str` or `None`: Why it cannot continue. `None` if it can.
    """
    if model not in _known:
        _known[model] = None  # for the engine that measures
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            _known[model] = _measure(model, make_engine)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            _known[model] = f"the model fails with it ({error!r})"
        finally:
            for module, training in modes:
                module.training = training
    return _known[model]


@torch.no_grad()
def _measure(model: PreTrainedModel, make_engine: Callable[[GenerationConfig], Any]) -> str | None:
    size: int = cast(Any, model.get_input_embeddings()).weight.shape[0]
    text = [(7 * i * i + 3 * i + 5) % size for i in range(sum(CONTEXTS) + 2 * sum(OBSERVATIONS))]
    contexts = {number: [text.pop() for _ in range(length)] for number, length in enumerate(CONTEXTS)}
    errors = []
    config = GenerationConfig(do_sample=False, pad_token_id=0, disable_compile=True)
    engine = make_engine(config)
    with masks_by_position() as masks, sampling_by(model, config), engine.session():
        for budgets in BUDGETS:
            for number, context in contexts.items():
                engine.submit(number, context, budgets[number])
            for number, turn in engine.collect(wait=True):
                errors.append(_logprob_error(model, contexts[number], turn))
                observation = [text.pop() for _ in range(OBSERVATIONS[number])]
                contexts[number] = contexts[number] + turn.token_ids + observation
        kept: KeptCache = engine._kept
        state_errors = _state_errors(model, kept)
    if window_layers(kept.cache) and not masks.local:
        return "the model does not make masks of sliding windows by the functions of `transformers`"
    if max(state_errors, default=0.0) > STATE_ERROR:
        return "the model does not continue from its states when it reads several tokens"
    if max(errors) > LOGPROB_ERROR:
        return "the model computes other logits with it than for the whole text"
    return None


def _logprob_error(model: Any, context: list[int], turn: Generation) -> float:
    """The median difference between the log-probabilities of a turn and those of a pass over the whole text."""
    ids = torch.tensor([context + turn.token_ids], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    expected = logits[0, len(context) - 1 : -1].float().log_softmax(dim=-1).gather(1, ids[0, len(context) :, None])
    return median((torch.tensor(turn.logprobs) - expected[:, 0].cpu()).abs().tolist())


def _state_errors(model: Any, kept: KeptCache) -> list[float]:
    """Relative differences between the states of the first layer that has some and those of one pass over the whole text."""
    errors = []
    for block in kept.states:
        number = next(i for i, states in enumerate(block.layers) if states)
        for place, row in enumerate(block.rows):
            ids, cache = torch.tensor([kept.contexts[row]], device=model.device), new_cache(model)
            assert cache is not None
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_name(model): cache})
            for state, expected in zip(block.layers[number], state_layers(cache)[number].states, strict=True):
                difference = (state[place] - expected[0]).float().norm() / expected.float().norm().clamp(min=1e-30)
                errors.append(difference.item())
    return errors
