"""What becomes of the tokens that a model samples in a search loop: kept, thrown away, or changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from transformers import PreTrainedTokenizerBase

CLOSING = ("</search>", "</answer>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """
    What became of the tokens of a batch, and how long they took.

    Args:
        rollouts (`int`):
            Rollouts.
        generated (`int`):
            Tokens that were sampled, the ones that end messages included.
        thrown_away (`int`):
            Those of them after the closing tag of their turn.
        changed (`int`):
            Those before, of which training sees others.
        rollouts_changed (`int`):
            Rollouts with at least one such token.
        trained (`int`):
            Completion tokens that the loss is taken of.
        attended (`int`):
            Completion tokens that are attended to.
        seconds (`float`):
            Time of the rollouts.
        model_seconds (`float`):
            Time of them in `generate`.
    """

    rollouts: int
    generated: int
    thrown_away: int
    changed: int
    rollouts_changed: int
    trained: int
    attended: int
    seconds: float
    model_seconds: float


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """
    A turn as it was sampled, and as it is trained on.

    Args:
        sampled (`list[int]`):
            S tokens, the one that ends the message included.
        trained (`list[int]`):
            T tokens.
    """

    sampled: list[int]
    trained: list[int]


def length_to_tag(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> int:
    """How many of the tokens there are up to the one that completes the first closing tag; all, if none does."""

    def closed(length: int) -> bool:
        text = tokenizer.decode(list(token_ids[:length]), skip_special_tokens=True)
        return any(tag in text for tag in CLOSING)

    if not closed(len(token_ids)):
        return len(token_ids)
    low, high = 1, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if closed(middle) else (middle + 1, high)
    return low


def count_changed(sampled: Sequence[int], trained: Sequence[int]) -> int:
    """How many of the sampled tokens have no counterpart in what is trained on, where both are laid along each other."""
    blocks = SequenceMatcher(None, sampled, trained, autojunk=False).get_matching_blocks()
    return len(sampled) - sum(block.size for block in blocks)


def count_turns(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Sequence[SampledTurn]]) -> dict[str, int]:
    """The fields of [`Count`] that depend on nothing but the turns of each rollout."""
    generated = thrown_away = changed = rollouts_changed = 0
    for turns in rollouts:
        changed_before = changed
        for turn in turns:
            length = length_to_tag(tokenizer, turn.sampled)
            generated += len(turn.sampled)
            thrown_away += len(turn.sampled) - length
            changed += count_changed(turn.sampled[:length], turn.trained)
        rollouts_changed += changed > changed_before
    return {
        "rollouts": len(rollouts),
        "generated": generated,
        "thrown_away": thrown_away,
        "changed": changed,
        "rollouts_changed": rollouts_changed,
    }
