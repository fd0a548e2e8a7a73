"""Turns and trajectories: the data that all other modules use.

A *turn* is the text that the model writes between two observations. A *trajectory* is the record of a rollout: the prompt,
the turns and the status.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..retrieval.base import Passage

Action = Literal["search", "answer", "invalid", "none"]
Retrieval = Literal["ok", "empty", "timeout", "error"]
Status = Literal["answered", "no_answer", "truncated", "retrieval_failed"]


@dataclass(slots=True, kw_only=True)
class Turn:
    """
    The text that the model wrote between two observations, and the observation after it.

    Args:
        token_ids (`list[int]`):
            The T sampled tokens, exactly as sampled: never decoded and encoded again.
        logprobs (`list[float]`, *optional*):
            The T log-probabilities of the engine, if it returns them.
        text (`str`, *optional*, defaults to `""`):
            The decoded tokens: the model-written text. With tags, it has no special tokens other than the tags; with tool
            calls, it has all control tokens except the one that ends the message.
        action (`str`, *optional*, defaults to `"none"`):
            `"search"`, `"answer"`, `"invalid"` (no well-formed action, or an empty query) or `"none"` (the model ended
            its message without any action).
        content (`str`, *optional*, defaults to `""`):
            The query, the answer, or `""`.
        observation_ids (`list[int]`, *optional*):
            The O tokens appended after the turn: passages, or a hint after an invalid action. Empty for the last turn.
        passages (`list[Passage]`, *optional*):
            The passages found, each with the part of its text that the model was shown (the length of an observation is
            limited).
        retrieval (`str`, *optional*):
            `"ok"`, `"empty"`, `"timeout"`, `"error"`, or `None` when no search was executed.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None
    text: str = ""
    action: Action = "none"
    content: str = ""
    observation_ids: list[int] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    retrieval: Retrieval | None = None

    @property
    def passage_text(self) -> str | None:
        """The titles and texts of the turn's passages as one string, or `None` when it has none."""
        parts = [part for passage in self.passages for part in (passage.title, passage.text)]
        # No answer matches across ¶ (`scoring.BREAK`), so not across two passages
        return "\n¶\n".join(parts) if parts else None


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """
    The record of a rollout: the prompt, the turns and the status.

    Args:
        prompt_ids (`list[int]`):
            The P prompt tokens.
        turns (`list[Turn]`, *optional*):
            The K turns.
        status (`str`, *optional*, defaults to `"no_answer"`):
            `"answered"`, `"no_answer"`, `"truncated"` (`max_completion_length` was reached) or `"retrieval_failed"`.
    """

    prompt_ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    status: Status = "no_answer"

    @property
    def completion_ids(self) -> list[int]:
        """The L tokens after the prompt, turns and observations in order."""
        return [token for turn in self.turns for token in (*turn.token_ids, *turn.observation_ids)]

    @property
    def loss_mask(self) -> list[int]:
        """L values: 1 on tokens that the model sampled, 0 on observations. The attention mask covers both."""
        return [m for turn in self.turns for m in [1] * len(turn.token_ids) + [0] * len(turn.observation_ids)]

    @property
    def turn_index(self) -> list[int]:
        """L values: the 0-based turn of a sampled token, -1 on observations."""
        return [
            i for k, turn in enumerate(self.turns) for i in [k] * len(turn.token_ids) + [-1] * len(turn.observation_ids)
        ]

    @property
    def logprobs(self) -> list[float] | None:
        """L log-probabilities of the engine, 0.0 on observations; `None` if a turn has none."""
        values: list[float] = []
        for turn in self.turns:
            if turn.logprobs is None:
                return None
            values += turn.logprobs + [0.0] * len(turn.observation_ids)
        return values

    @property
    def answer(self) -> str | None:
        """The answer given in the last turn, or `None`."""
        return self.turns[-1].content if self.turns and self.turns[-1].action == "answer" else None

    @property
    def queries(self) -> list[str]:
        """The query of each turn, `""` for turns that did not search. Length K."""
        return [turn.content if turn.action == "search" else "" for turn in self.turns]

    @property
    def passage_texts(self) -> list[str | None]:
        """The passages of each turn as one string, `None` for turns without. Length K."""
        return [turn.passage_text for turn in self.turns]

    def to_dict(self) -> dict[str, Any]:
        """This trajectory as JSON-serialisable data; [`Trajectory.from_dict`] reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Trajectory":
        """
        Read the data written by [`Trajectory.to_dict`]. Unknown keys are ignored.

        Args:
            data (`dict`):
                The data of one trajectory.
        """
        turns = [
            Turn(
                **{k: v for k, v in turn.items() if k in Turn.__dataclass_fields__ and k != "passages"},
                passages=[
                    Passage(**{k: v for k, v in passage.items() if k in Passage.__dataclass_fields__})
                    for passage in turn.get("passages", [])
                ],
            )
            for turn in data["turns"]
        ]
        return cls(prompt_ids=data["prompt_ids"], turns=turns, status=data["status"])
