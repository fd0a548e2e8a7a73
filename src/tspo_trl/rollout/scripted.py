"""Rollouts of turns that are given instead of sampled: everything else is as in a rollout of a model."""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ..engines.base import Generation
from ..retrieval.base import Retriever
from .limits import SearchLimits
from .loop import SearchLoop
from .protocol import SearchProtocol
from .trajectory import Trajectory


class ScriptedEngine:
    """
    An [`Engine`] that returns given turns.

    Args:
        scripts (`Sequence[Sequence[list[int]]]`):
            For each rollout the tokens of its turns, in order.
        end (`int`):
            An end-of-sequence token, returned as the turn after the last one.
    """

    in_rounds = True
    max_context_length: int | None = None

    def __init__(self, scripts: Sequence[Sequence[list[int]]], end: int):
        self._left = [deque(script) for script in scripts]
        self._end = end
        self._written: list[tuple[int, Generation]] = []

    def session(self) -> AbstractContextManager[None]:
        """See [`Engine.session`]."""
        return nullcontext()

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """See [`Engine.submit`]. The turn may be longer than `max_new_tokens`."""
        left = self._left[number]
        turn = left.popleft() if left else [self._end]
        self._written.append((number, Generation(token_ids=turn)))

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """See [`Engine.collect`]."""
        written, self._written = self._written, []
        return written


def follow_scripts(
    prompt_ids: Sequence[list[int]],
    scripts: Sequence[Sequence[list[int]]],
    retriever: Retriever,
    protocol: SearchProtocol,
    *,
    eos_token_ids: Sequence[int],
    limits: SearchLimits | None = None,
) -> list[Trajectory]:
    """
    Roll out given turns with the search loop, so that their searches are executed and their observations are those of a
    model's rollout.

    Args:
        prompt_ids (`Sequence[list[int]]`):
            B prompts of token ids.
        scripts (`Sequence[Sequence[list[int]]]`):
            For each prompt the tokens of the turns. They are not cut at the limits of a turn or
            a completion.
        retriever ([`Retriever`]):
            Executes the searches.
        protocol ([`SearchProtocol`]):
            Reads the turns and writes observations.
        eos_token_ids (`Sequence[int]`):
            The tokens that end a message of the model.
        limits ([`SearchLimits`], *optional*):
            The limits of the search loop. Defaults to those of a new [`SearchLimits`].

    Returns:
        `list[Trajectory]`: B trajectories. If a turn is parsed as another action, its rollout continues differently.
    """
    engine = ScriptedEngine(scripts, eos_token_ids[0])
    loop = SearchLoop(engine, retriever, protocol, eos_token_ids=eos_token_ids, limits=limits)
    return loop.run(prompt_ids)[0]
