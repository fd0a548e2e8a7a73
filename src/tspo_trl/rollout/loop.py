"""The search loop: turns prompts into trajectories with an engine, a protocol and a retriever."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..engines.base import Engine
from ..retrieval.base import Passage, Retriever, failure_kind
from ..retrieval.results import Outcome, search_each
from .limits import SearchLimits
from .protocol import SearchProtocol
from .stats import RolloutStats
from .trajectory import Trajectory, Turn

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _OpenRollout:
    """A rollout that has not ended."""

    number: int
    trajectory: Trajectory
    limit: int  # maximum number of completion tokens
    completion: list[int] = field(default_factory=list)

    @property
    def room(self) -> int:
        return self.limit - len(self.completion)

    @property
    def query(self) -> str:
        return self.trajectory.turns[-1].content


@dataclass(frozen=True, slots=True)
class _SearchReply:
    """The result of a call of the retriever."""

    outcomes: list[Outcome]  # of each query
    seconds: float


@dataclass(frozen=True, slots=True)
class _Search:
    """A call of the retriever that has not ended."""

    items: list[_OpenRollout]
    queries: list[str]
    reply: Future[_SearchReply]


class SearchLoop:
    """
    Turns prompts into trajectories. The model writes a turn, the loop executes its search and appends the passages. This
    repeats until the model answers.

    With N = `max_searches`, the first N turns of a rollout may search; an invalid action counts as one of these turns.
    The next turn is final: a search in it is not executed. Tokens are appended as they were sampled. They are never decoded
    and encoded again.

    With an engine that generates in rounds, all rollouts advance together: one batched generation, then one batched
    retrieval. With other engines, a rollout continues as soon as it has its passages. The retriever then runs in its own
    thread, in parallel with the engine, and each call takes all waiting queries.

    Args:
        engine ([`Engine`]):
            Generates the turns.
        retriever ([`Retriever`]):
            Executes the searches.
        protocol ([`SearchProtocol`]):
            Reads actions and writes observations.
        eos_token_ids (`Sequence[int]`):
            The tokens that end a message of the model.
        limits ([`SearchLimits`], *optional*):
            The limits of turns, queries, observations and completions. Defaults to those of a new [`SearchLimits`].
        max_context_length (`int`, *optional*):
            Maximum number of tokens of prompt and completion together, usually the number of positions of the model.

    Raises:
        `ValueError`: If `max_observation_tokens` is too small for an observation of the protocol.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        protocol: SearchProtocol,
        *,
        eos_token_ids: Sequence[int],
        limits: SearchLimits | None = None,
        max_context_length: int | None = None,
    ):
        limits = limits or SearchLimits()
        check_observation_tokens(protocol, limits)
        self.engine = engine
        self.retriever = retriever
        self.protocol = protocol
        self.eos_token_ids = frozenset(eos_token_ids)
        self.limits = limits
        self.max_context_length = max_context_length

    def run(self, prompt_ids: Sequence[list[int]]) -> tuple[list[Trajectory], RolloutStats]:
        """
        Make one rollout for each prompt.

        Args:
            prompt_ids (`Sequence[list[int]]`):
                B prompts of token ids. Repeat a prompt to get several rollouts of it.

        Returns:
            `tuple[list[Trajectory], RolloutStats]`: B trajectories in the order of the prompts, and the time and searches
                that they took.

        Raises:
            `ValueError`: If a prompt is too long for a completion within `max_context_length`.
        """
        stats = RolloutStats()
        items = [
            _OpenRollout(i, Trajectory(prompt_ids=list(ids)), self._limit(ids)) for i, ids in enumerate(prompt_ids)
        ]
        found: dict[str, list[Passage]] = {}  # passages by query, for all rollouts of this call
        waiting: list[_OpenRollout] = []  # waiting for passages
        search: _Search | None = None
        with self.engine.session(), self._searcher() as call:
            # Submit the first turns
            generating = len(items)
            for item in items:
                self._submit(item)
            while generating or waiting or search:
                # Observe: append the passages found, and submit the next turn
                ready = [item for item in waiting if item.query in found]
                waiting = [item for item in waiting if item.query not in found]
                for item in ready:
                    self._observe(item, found[item.query])
                    self._submit(item)
                generating += len(ready)
                # Start a search for all rollouts that wait
                if waiting and search is None:
                    queries = list(dict.fromkeys(item.query for item in waiting))
                    search = _Search(waiting, queries, call(self._retrieve, queries))
                    waiting = []
                # Finish the search, or collect the turns that the engine has written
                if search and (search.reply.done() or not generating or self.engine.in_rounds):
                    waiting += self._finish(search, found, stats)
                    search = None
                elif generating:
                    written = self._collect(items, stats, wait=search is None)
                    generating -= len(written)
                    for item in written:
                        if self._advance(item):
                            stats.searches += 1
                            waiting.append(item)
                        elif item.trajectory.turns[-1].observation_ids:  # a hint
                            self._submit(item)
                            generating += 1
        return [item.trajectory for item in items], stats

    def _limit(self, prompt_ids: list[int]) -> int:
        lengths = [length for length in (self.max_context_length, self.engine.max_context_length) if length is not None]
        limit = self.limits.max_completion_length or sys.maxsize
        if not lengths:
            return limit
        room = min(lengths) - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"A prompt has {len(prompt_ids)} tokens, but the model takes at most {min(lengths)} tokens of prompt and "
                "completion together. Shorten the prompts or leave out long questions."
            )
        return min(limit, room)

    @contextmanager
    def _searcher(self) -> Iterator[Callable[..., Future[_SearchReply]]]:
        """A function that calls the retriever: in this thread, or in another one if the engine runs in parallel."""
        if self.engine.in_rounds:
            yield _call
            return
        executor = ThreadPoolExecutor(1, "search")
        try:
            yield executor.submit
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, item: _OpenRollout) -> None:
        context = item.trajectory.prompt_ids + item.completion
        self.engine.submit(item.number, context, min(self.limits.max_turn_tokens, item.room))

    def _collect(self, items: list[_OpenRollout], stats: RolloutStats, *, wait: bool) -> list[_OpenRollout]:
        """Collect turns from the engine; return the rollouts that have a new turn."""
        start = time.perf_counter()
        written = self.engine.collect(wait=wait)
        stats.generate_seconds += time.perf_counter() - start
        if not written:
            return []
        for number, generation in written:
            item = items[number]
            turns = item.trajectory.turns
            text, action, content = self.protocol.read(
                generation.token_ids,
                ended=generation.token_ids[-1] in self.eos_token_ids,
                before=turns[-1].observation_ids if turns else item.trajectory.prompt_ids,
            )
            turns.append(
                Turn(
                    token_ids=generation.token_ids,
                    logprobs=generation.logprobs,
                    text=text,
                    action=action,
                    content=content,
                )
            )
            item.completion += generation.token_ids
        return [items[number] for number, _ in written]

    def _advance(self, item: _OpenRollout) -> bool:
        """End the rollout, append a hint, or return `True` if the loop must execute a search."""
        trajectory = item.trajectory
        turn = trajectory.turns[-1]
        final = len(trajectory.turns) > self.limits.max_searches
        if turn.action == "answer":
            trajectory.status = "answered"
        elif turn.action == "invalid" and item.room == 0:
            trajectory.status = "truncated"
        elif turn.action == "none" or final:
            trajectory.status = "no_answer"
        elif turn.action == "search" and item.room > self.protocol.min_observation_tokens:
            turn.content = self.protocol.cut_query(turn.content, self.limits.max_query_tokens)
            return True
        elif turn.action == "invalid" and item.room > len(hint := self.protocol.hint_after(turn.token_ids)):
            turn.observation_ids = hint
            item.completion += hint
        else:
            trajectory.status = "truncated"
        return False

    def _retrieve(self, queries: list[str]) -> _SearchReply:
        start = time.perf_counter()
        outcomes = search_each(self.retriever, queries, self.limits.num_passages)
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            count = f" for {len(failures)} of {len(queries)} queries" if len(failures) < len(queries) else ""
            logger.warning("%r failed to search%s: %r", self.retriever, count, failures[0])
        return _SearchReply(outcomes, time.perf_counter() - start)

    def _finish(self, search: _Search, found: dict[str, list[Passage]], stats: RolloutStats) -> list[_OpenRollout]:
        """Wait for a search and keep the passages found; return the rollouts that continue."""
        reply = search.reply.result()
        stats.latencies.append(reply.seconds)
        stats.queries += len(search.queries)
        failed: dict[str, Exception] = {}
        for query, outcome in zip(search.queries, reply.outcomes, strict=True):
            if isinstance(outcome, Exception):  # a failed search must not lose the other rollouts
                failed[query] = stats.error = outcome
            else:
                found[query] = outcome
        items = []
        for item in search.items:
            if item.query not in failed:
                items.append(item)
                continue
            failure = failure_kind(failed[item.query])
            stats.failed_searches[failure] += 1
            item.trajectory.turns[-1].retrieval = "timeout" if failure == "timeout" else "error"
            item.trajectory.status = "retrieval_failed"
        return items

    def _observe(self, item: _OpenRollout, passages: list[Passage]) -> None:
        turn = item.trajectory.turns[-1]
        budget = min(self.limits.max_observation_tokens, item.room - 1)  # room for at least one token of the next turn
        closing = self.protocol.closing_ids(turn.token_ids)
        observation = self.protocol.observe(passages, budget - len(closing))
        turn.observation_ids, turn.passages = closing + observation.token_ids, observation.passages
        turn.retrieval = "ok" if passages else "empty"
        item.completion += turn.observation_ids


def check_observation_tokens(protocol: SearchProtocol, limits: SearchLimits) -> None:
    """
    Check that an observation has room for a passage.

    Args:
        protocol ([`SearchProtocol`]):
            Writes observations.
        limits ([`SearchLimits`]):
            The limits of the search loop.

    Raises:
        `ValueError`: If `max_observation_tokens` is too small.
    """
    if limits.max_searches and limits.max_observation_tokens < protocol.min_observation_tokens:
        raise ValueError(
            f"`max_observation_tokens` must be at least {protocol.min_observation_tokens}, got "
            f"{limits.max_observation_tokens}: the opening and the closing of an observation count too."
        )


def _call(function: Callable[..., _SearchReply], *args: object) -> Future[_SearchReply]:
    reply: Future[_SearchReply] = Future()
    reply.set_result(function(*args))
    return reply
