"""Count the sampled tokens that a search loop keeps, throws away or changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from transformers import PreTrainedTokenizerBase

CLOSING = ("</search>", "</answer>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """
    Token counts and times of a batch of rollouts.

    Args:
        rollouts (`int`):
            Number of rollouts.
        generated (`int`):
            Number of sampled tokens, including end-of-sequence tokens.
        thrown_away (`int`):
            Number of sampled tokens after the closing tag of their turn.
        changed (`int`):
            Number of sampled tokens up to the closing tag that training replaces by other tokens.
        rollouts_changed (`int`):
            Number of rollouts with at least one changed token.
        trained (`int`):
            Number of completion tokens in the loss.
        attended (`int`):
            Number of completion tokens that are attended to.
        seconds (`float`):
            Time of the rollouts, in seconds.
        model_seconds (`float`):
            Part of this time in `generate`, in seconds.
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
    The sampled tokens and the trained tokens of a turn.

    Args:
        sampled (`list[int]`):
            S sampled tokens, including the end-of-sequence token.
        trained (`list[int]`):
            T tokens used in training.
    """

    sampled: list[int]
    trained: list[int]


def length_to_tag(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> int:
    """Return the number of tokens up to the end of the first closing tag, or of all tokens without a closing tag."""

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
    """Count the sampled tokens without a counterpart when they are aligned with the trained tokens."""
    blocks = SequenceMatcher(None, sampled, trained, autojunk=False).get_matching_blocks()
    return len(sampled) - sum(block.size for block in blocks)


def count_turns(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Sequence[SampledTurn]]) -> dict[str, int]:
    """Compute the fields of [`Count`] that depend only on the turns of the rollouts."""
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
