"""
The training forward without what adds nothing to the gradient: rollouts without a signal, padding, and the language
model head on passages. Loss and gradients stay the same, up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import pad

from ..rollout.trajectory import Trajectory
from .dealing import deal
from .masking import has_signal, loss_mask

Scores = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Scored:
    """The tokens whose log-probabilities a forward computes, and what the others get."""

    tokens: Tensor
    """Booleans of shape (B, L): the completion tokens to score."""
    logps: Tensor
    """Log-probabilities of the other tokens, shape (B, L)."""
    entropies: Tensor
    """Entropies of the other tokens, shape (B, L)."""

    @classmethod
    def all_of(cls, completion_mask: Tensor) -> "Scored":
        """
        All completion tokens. Padding gets 0.

        Args:
            completion_mask (`torch.Tensor`):
                1 for the completion tokens, 0 for padding, shape (B, L).
        """
        nothing = torch.zeros(completion_mask.shape, device=completion_mask.device)
        return cls(completion_mask != 0, nothing, nothing)

    def take(self, rows: Tensor) -> "Scored":
        """
        The scored tokens of some rows.

        Args:
            rows (`torch.Tensor`):
                Their indices.
        """
        return Scored(self.tokens[rows], self.logps[rows], self.entropies[rows])

    @classmethod
    def of_loss(cls, batch: dict[str, Any], leave_out: bool) -> "Scored":
        """
        The trained tokens of a batch of rollouts.

        The other tokens get their old log-probabilities, so that their ratios are 1. A token of a rollout that is left
        out gets the entropy estimate -log p, whose expectation over the sampled tokens is the entropy.

        Args:
            batch (`dict`):
                The inputs of the loss, with `sampled_logps`, the log-probabilities at sampling, of shape (B, L).
            leave_out (`bool`):
                Whether to leave out rollouts without a signal.
        """
        tokens = loss_mask(batch) != 0
        nothing = torch.zeros(tokens.shape, device=tokens.device)
        old, sampled = batch.get("old_per_token_logps"), batch.get("sampled_logps")
        if leave_out:
            tokens = tokens & has_signal(batch)[:, None]
        return cls(
            tokens,
            nothing if old is None else old.float(),
            nothing if sampled is None else -sampled,
        )


def scores_of(
    score: Callable[..., Scores],
    model: torch.nn.Module,
    backbone: torch.nn.Module | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    scored: Scored,
    **options: Any,
) -> Scores:
    """
    Log-probabilities and entropies of some completion tokens, by a forward of the rows and columns that they need.

    If no token is scored, two tokens of one row still go through the model, because other processes wait for this
    process in the collectives of the forward and the backward.

    Args:
        score (`Callable`):
            `GRPOTrainer._get_per_token_logps_and_entropies`.
        model (`torch.nn.Module`):
            The model.
        backbone (`torch.nn.Module` or `None`):
            The part of the model before its head. `None` scores every token of the rows that are left.
        input_ids (`torch.Tensor`):
            Prompts, padded on the left, and completions, padded on the right, shape (B, P + L).
        attention_mask (`torch.Tensor`):
            1 for their tokens, 0 for padding, shape (B, P + L).
        scored ([`Scored`]):
            The tokens to score.
        **options (`Any`):
            Further arguments of `score`.

    Returns:
        `tuple`: Log-probabilities and entropies of shape (B, L), or `None`, and the auxiliary loss or `None`.
    """
    length = scored.tokens.size(1)
    prompt = input_ids.size(1) - length
    tokens, idle = scored.tokens, not scored.tokens.any()
    if idle:
        tokens = torch.zeros_like(tokens)
        tokens[0, 0] = True
        attention_mask = torch.zeros_like(attention_mask)
        attention_mask[0, prompt - 1 : prompt + 1] = 1

    # The rows with a scored token, from the first column that is attended to up to the last scored token
    rows = tokens.any(dim=1).nonzero().squeeze(1)
    attended = attention_mask[rows].any(dim=0).nonzero()
    start, stop = int(attended[0]), prompt + int(tokens.any(dim=0).nonzero()[-1]) + 1
    tokens = tokens[rows, : stop - prompt]
    forward = model if backbone is None else _Head(model, backbone, pad(tokens, (prompt - start, 0)))
    logps, entropies, aux_loss = score(
        forward, input_ids[rows, start:stop], attention_mask[rows, start:stop], stop - prompt, **options
    )

    if idle:  # keeps the graph
        return scored.logps + 0.0 * logps.sum(), None if entropies is None else scored.entropies, aux_loss

    def put(values: Tensor | None, others: Tensor) -> Tensor | None:
        if values is None:
            return None
        grown = pad(values, (0, length - values.size(1)))
        everywhere = grown.new_zeros(others.shape).index_copy(0, rows, grown)
        return torch.where(scored.tokens, everywhere, others.to(everywhere.dtype))

    placed = put(logps, scored.logps)
    assert placed is not None
    return placed, put(entropies, scored.entropies), aux_loss


def sampled_logps(trajectories: Sequence[Trajectory], completion_ids: Tensor) -> Tensor:
    """
    The log-probabilities with which the tokens of rollouts were sampled.

    Args:
        trajectories (`Sequence[Trajectory]`):
            B rollouts.
        completion_ids (`torch.Tensor`):
            Their completions, padded on the right, shape (B, L).

    Returns:
        `torch.Tensor`: Shape (B, L), 0 on observations and padding, and where the engine reports none.
    """
    logps = torch.zeros(completion_ids.shape)
    for row, trajectory in zip(logps, trajectories, strict=True):
        if trajectory.logprobs:
            row[: len(trajectory.logprobs)] = torch.tensor(trajectory.logprobs).nan_to_num()
    return logps.to(completion_ids.device)


def find_backbone(model: torch.nn.Module) -> torch.nn.Module | None:
    """
    The part of a causal language model before its head.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, without wrappers of a parallel strategy.

    Returns:
        `torch.nn.Module` or `None`: The backbone, or `None` if the model has no separate one.
    """
    network: Any = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    backbone = getattr(network, "base_model", network)
    return None if backbone is network else backbone


class CompactForwardMixin:
    """
    The training half of a step of a [`~trl.GRPOTrainer`], without what adds nothing to the gradient, see
    `compact_forward` of [`TSPOConfig`].

    The changes with respect to [`~trl.GRPOTrainer`] are:

    - A forward reads neither rollouts without a signal nor columns that are padding in all of its rows.
    - The head scores only tokens that are trained on.
    - The rollouts of a step are dealt to micro-batches and processes by their lengths.
    """

    args: Any
    model: Any
    accelerator: Any
    loss_type: str
    beta: float
    top_entropy_quantile: float
    aux_loss_enabled: bool
    _step: int
    _buffered_inputs: Any
    _entropy_bonus_enabled: bool
    _scored: Scored | None = None  # while a loss is computed

    @property
    def _compact(self) -> bool:
        """Whether forwards are compact. The auxiliary loss of a mixture of experts is a mean over all tokens."""
        wanted = self.args.compact_forward
        return not self.aux_loss_enabled and (self.args.advantage_level != "trajectory" if wanted is None else wanted)

    @property
    def _leaves_out(self) -> bool:
        """Whether rollouts without a signal are left out: no term of the loss but the advantages reads them."""
        return self.beta == 0.0 and self.top_entropy_quantile == 1.0 and not self._entropy_bonus_enabled

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        whole_step = self.loss_type != "bnpo" and self.top_entropy_quantile == 1.0 and not self._entropy_bonus_enabled
        if self._buffered_inputs is before or not (self.model.training and self._compact and whole_step):
            return inputs
        accumulation = self.args.gradient_accumulation_steps
        self._buffered_inputs = deal(
            self._buffered_inputs, self.accelerator, accumulation=accumulation, leave_out=self._leaves_out
        )
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self._scored = Scored.of_loss(inputs, self._leaves_out) if self._compact else None
        try:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._scored = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> Scores:
        score = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        if not self._compact:
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size, **options)
        # A module that is compiled does not see a hook that is added later
        backbone = None if self.args.torch_compile else find_backbone(self.accelerator.unwrap_model(model))
        if self._scored is not None:
            return scores_of(score, model, backbone, input_ids, attention_mask, self._scored, **options)

        # Before the advantages are known: rollouts of similar lengths are scored together
        scored = Scored.all_of(attention_mask[:, -logits_to_keep:])
        order = torch.argsort(attention_mask.sum(dim=1), descending=True, stable=True)
        chunks = [
            scores_of(score, model, backbone, input_ids[rows], attention_mask[rows], scored.take(rows), **options)
            for rows in order.split(batch_size or len(order))
        ]
        logps, entropies, _ = zip(*chunks, strict=True)
        back = torch.argsort(order)
        return torch.cat(logps)[back], torch.cat(entropies)[back] if entropies[0] is not None else None, None


class _Head:
    """A model whose head scores some tokens only. TRL's fused head scores every position that the backbone returns."""

    def __init__(self, model: torch.nn.Module, backbone: torch.nn.Module, tokens: Tensor):
        self._model = model
        self._backbone = backbone
        self._tokens = tokens  # shape (B, W)

    def __call__(self, *, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Any:
        """The fields of TRL's output, of shape (B, W - 1), 0 for tokens that are not scored."""
        tokens = self._tokens[:, 1:] & (labels[:, 1:] != -100)
        with _selected(self._backbone, tokens):
            output = self._model(input_ids=input_ids, shift_labels=labels[:, 1:][tokens][None], **inputs)

        def put(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.new_zeros(tokens.shape).masked_scatter(tokens, values)

        return SimpleNamespace(log_probs=put(output.log_probs), entropy=put(output.entropy), aux_loss=output.aux_loss)


@contextmanager
def _selected(backbone: torch.nn.Module, tokens: Tensor) -> Iterator[None]:
    """Keep only the hidden states that predict these tokens, of shape (B, W - 1). They become one row."""

    def select(_: Any, __: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden[:, :-1][tokens.to(hidden.device)][None]
        return output

    hook = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()
