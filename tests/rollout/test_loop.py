import threading

import pytest

from helpers.scripted import PASSAGE, QUESTION, RecordingRetriever, ScriptedEngine, loop_options
from tspo_trl.retrieval import Passage, RetrievalError
from tspo_trl.retrieval.base import RetrievalLogError
from tspo_trl.rollout.loop import SearchLoop
from tspo_trl.rollout.tags import TagProtocol


@pytest.fixture
def roll(tokenizer):
    """Roll out scripts (one list of turns for each rollout) and return trajectories, stats, engine and retriever."""

    def run(*scripts, retriever=None, **options):
        retriever = retriever or RecordingRetriever()
        # The number of the rollout makes prompts unique, so that the engine can distinguish them
        prompts = [tokenizer(QUESTION + " Doc" * (i + 1) + "\n")["input_ids"] for i in range(len(scripts))]
        engine = ScriptedEngine(tokenizer, {tuple(p): list(s) for p, s in zip(prompts, scripts, strict=True)})
        options = {"max_searches": 2, "max_turn_tokens": 16, "max_observation_tokens": 64, **options}
        loop = SearchLoop(
            engine, retriever, TagProtocol(tokenizer), eos_token_ids=[tokenizer.eos_token_id], **loop_options(options)
        )
        trajectories, stats = loop.run(prompts)
        return trajectories, stats, engine, retriever

    return run


def test_search_then_answer(roll, tokenizer):
    (t,), stats, engine, retriever = roll(["<search> Silent Harbor</search>", "<answer> Mira Talvek</answer>"])
    assert t.status == "answered"
    assert [turn.action for turn in t.turns] == ["search", "answer"]
    assert t.turns[0].content == "Silent Harbor"
    assert t.turns[0].retrieval == "ok"
    assert t.turns[0].passages == [PASSAGE]
    assert t.turns[1].retrieval is None
    assert t.turns[1].observation_ids == []
    assert t.answer == "Mira Talvek"
    assert retriever.calls == [["Silent Harbor"]]
    assert engine.sessions == 1
    assert (stats.searches, stats.failed_searches, len(stats.latencies)) == (1, {}, 1)


def test_tokens_are_appended_as_sampled(roll, tokenizer):
    (t,), _, engine, _ = roll(["<search> Silent Harbor</search>", "<answer> Mira Talvek</answer>"])
    first, second = (calls[0] for calls in engine.calls)
    assert first == t.prompt_ids
    assert second == t.prompt_ids + t.turns[0].token_ids + t.turns[0].observation_ids
    assert t.completion_ids == second[len(t.prompt_ids) :] + t.turns[1].token_ids
    sampled, shown = len(t.turns[0].token_ids), len(t.turns[0].observation_ids)
    answered = len(t.turns[1].token_ids)
    assert t.loss_mask == [1] * sampled + [0] * shown + [1] * answered
    assert t.turn_index == [0] * sampled + [-1] * shown + [1] * answered
    assert t.logprobs == [-0.5] * sampled + [0.0] * shown + [-0.5] * answered
    text = tokenizer.decode(t.turns[0].observation_ids)
    assert "<information>" in text
    assert "</information>" in text
    assert PASSAGE.text in text


def test_a_round_makes_one_retrieval_call_without_duplicate_or_known_queries(roll):
    search = "<search> {}</search>"
    trajectories, stats, _, retriever = roll(
        [search.format("Silent Harbor"), search.format("Golden Mirror"), "<answer> x</answer>"],
        [search.format("Silent Harbor"), search.format("Silent Harbor"), "<answer> x</answer>"],
        [search.format("Golden Mirror"), "<answer> x</answer>"],
        ["<answer> x</answer>"],
    )
    assert retriever.calls == [["Silent Harbor", "Golden Mirror"]]
    assert (stats.searches, len(stats.latencies), stats.queries) == (5, 1, 2)
    assert [len(t.turns) for t in trajectories] == [3, 3, 2, 1]


def test_the_turn_after_the_last_search_is_final(roll):
    search = "<search> Silent Harbor</search>"
    (t,), stats, _, _ = roll([search, search, search, "<answer> x</answer>"])
    assert t.status == "no_answer"
    assert [turn.retrieval for turn in t.turns] == ["ok", "ok", None]
    assert t.turns[-1].observation_ids == []
    assert stats.searches == 2


def test_without_searches_the_first_turn_is_final(roll):
    (t,), _, _, retriever = roll(["<search> Silent Harbor</search>"], max_searches=0)
    assert t.status == "no_answer"
    assert retriever.calls == []


@pytest.mark.parametrize(
    "invalid", ["<search> Silent Harbor</answer>", "<search></search>", "Silent Harbor</search>", "Doc " * 16]
)
def test_an_invalid_action_gets_a_hint_and_costs_a_turn(roll, tokenizer, invalid):
    (t,), _, _, retriever = roll([invalid, invalid, "<search> Silent Harbor</search>"])
    assert [turn.action for turn in t.turns] == ["invalid", "invalid", "search"]
    assert t.status == "no_answer"
    assert "not valid" in tokenizer.decode(t.turns[0].observation_ids)
    assert t.turns[0].passages == []
    assert retriever.calls == []


def test_the_model_may_end_without_an_action(roll):
    (t,), _, _, _ = roll(["Silent Harbor <eos>"])
    assert t.status == "no_answer"
    assert t.turns[0].action == "none"


def test_text_after_a_failed_search_is_never_trained_on(roll):
    retriever = RecordingRetriever(error=TimeoutError("too slow"))
    trajectories, stats, _, _ = roll(
        ["<search> Silent Harbor</search>"], ["<answer> Mira Talvek</answer>"], retriever=retriever
    )
    assert [t.status for t in trajectories] == ["retrieval_failed", "answered"]
    assert trajectories[0].turns[-1].retrieval == "timeout"
    assert trajectories[0].turns[-1].observation_ids == []
    assert (stats.searches, stats.failed_searches.total()) == (1, 1)
    assert stats.error is retriever.error


@pytest.mark.parametrize(
    ("retriever", "kind"),
    [
        (RecordingRetriever(error=ConnectionError("refused")), "error"),
        (RecordingRetriever(error=ValueError("malformed")), "error"),
        (RecordingRetriever(error=TimeoutError()), "timeout"),
    ],
)
def test_the_kind_of_a_failure_is_recorded(roll, retriever, kind):
    (t,), _, _, _ = roll(["<search> Silent Harbor</search>"], retriever=retriever)
    assert t.turns[0].retrieval == kind
    assert t.status == "retrieval_failed"


def test_wrong_number_of_results_counts_as_a_failed_search(roll):
    class Short(RecordingRetriever):
        def search(self, queries, k):
            return []

    (t,), stats, _, _ = roll(["<search> Silent Harbor</search>"], retriever=Short())
    assert t.status == "retrieval_failed"
    assert "asked for 1 queries, got 0 results" in str(stats.error)


def test_the_model_reads_that_nothing_was_found(roll, tokenizer):
    (t,), _, _, _ = roll(
        ["<search> Silent Harbor</search>", "<answer> x</answer>"], retriever=RecordingRetriever(passages=[])
    )
    assert t.turns[0].retrieval == "empty"
    assert t.turns[0].passages == []
    assert "Nothing was found." in tokenizer.decode(t.turns[0].observation_ids)
    assert t.status == "answered"


def test_passages_beyond_the_requested_number_are_dropped(roll):
    many = [PASSAGE, Passage("8", "Golden Mirror", "x"), Passage("9", "Iron Tower", "x")]

    class Generous(RecordingRetriever):
        def search(self, queries, k):
            return [many for _ in queries]

    (t,), _, _, _ = roll(
        ["<search> x</search>", "<answer> x</answer>"], retriever=Generous(), num_passages=2, max_observation_tokens=96
    )
    assert [p.id for p in t.turns[0].passages] == ["7", "8"]


def test_only_the_shown_part_of_a_passage_is_kept(roll, tokenizer):
    """Credit reads only the text that the model saw, so it does not find a golden answer that was cut off."""
    (t,), _, _, _ = roll(["<search> x</search>", "<answer> x</answer>"], max_observation_tokens=20)
    (shown,) = t.turns[0].passages
    assert PASSAGE.text.startswith(shown.text)
    assert "Talvek" not in shown.text
    assert shown.text in tokenizer.decode(t.turns[0].observation_ids)


def test_a_long_query_is_cut_before_it_is_sent(roll):
    (t,), _, _, retriever = roll(
        ["<search> Silent Harbor Golden Mirror Iron Tower</search>", "<answer> x</answer>"], max_query_tokens=3
    )
    assert retriever.calls == [["Silent Harbor Golden"]]
    assert t.turns[0].content == "Silent Harbor Golden"


@pytest.mark.parametrize("limit", range(1, 90))
def test_the_completion_never_exceeds_its_budget(roll, limit):
    search = "<search> Silent Harbor</search>"
    (t,), _, _, _ = roll(
        [search, "Doc Doc", search, "<answer> x</answer>"], max_completion_length=limit, max_searches=3
    )
    assert 1 <= len(t.completion_ids) <= limit
    assert all(turn.token_ids for turn in t.turns)
    assert t.turns[-1].observation_ids == []
    if t.status == "truncated":
        assert t.answer is None


def test_the_status_depends_on_the_remaining_budget(roll):
    search = "<search> Silent Harbor</search>"
    statuses = {}
    for limit in (2, 10, 200):
        (t,), _, _, _ = roll([search, "<answer> x</answer>"], max_completion_length=limit)
        statuses[limit] = t.status
    assert statuses == {2: "truncated", 10: "truncated", 200: "answered"}


def test_a_search_without_room_for_its_result_is_not_executed(roll):
    (t,), _, _, retriever = roll(["<search> Silent Harbor</search>"], max_completion_length=8)
    assert t.status == "truncated"
    assert retriever.calls == []


def test_prompt_and_completion_fit_the_context(roll, tokenizer):
    (t,), _, _, _ = roll(["<search> Silent Harbor</search>", "<answer> x</answer>"], max_context_length=30)
    assert len(t.prompt_ids) + len(t.completion_ids) <= 30
    with pytest.raises(ValueError, match="at most 5 tokens"):
        roll(["<answer> x</answer>"], max_context_length=5)


class Streaming(ScriptedEngine):
    """Finishes submitted turns when a rule says so. `collect` returns the finished turns without waiting."""

    in_rounds = False

    def __init__(self, tokenizer, scripts, ready):
        super().__init__(tokenizer, scripts)
        self.ready, self.log = ready, []

    def submit(self, number, context, max_new_tokens):
        self.log.append(number)
        super().submit(number, context, max_new_tokens)

    def collect(self, *, wait):
        numbers = [number for number in sorted(self._submitted) if self.ready(self, number)]
        assert numbers or not wait, f"it would wait forever: {self.log}"
        turns = [self._submitted.pop(number) for number in numbers]
        return list(zip(numbers, self.generate(*zip(*turns, strict=True)), strict=True)) if turns else []


def roll_streaming(tokenizer, scripts, retriever, ready, **options):
    prompts = [tokenizer(QUESTION + " Doc" * (i + 1) + "\n")["input_ids"] for i in range(len(scripts))]
    engine = Streaming(tokenizer, {tuple(p): list(s) for p, s in zip(prompts, scripts, strict=True)}, ready)
    options = {"max_searches": 2, "max_turn_tokens": 16, "max_observation_tokens": 64, **options}
    loop = SearchLoop(
        engine, retriever, TagProtocol(tokenizer), eos_token_ids=[tokenizer.eos_token_id], **loop_options(options)
    )
    return *loop.run(prompts), engine


SEARCHES = ["<search> Silent Harbor</search>", "<search> Mira Talvek</search>", "<answer> Mira Talvek</answer>"]


def test_a_rollout_continues_while_a_turn_of_another_rollout_is_generated(tokenizer):
    # The turn of rollout 1 finishes only after all three turns of rollout 0
    retriever = RecordingRetriever()
    (first, second), stats, engine = roll_streaming(
        tokenizer, [SEARCHES, SEARCHES[2:]], retriever, lambda engine, n: n == 0 or engine.log.count(0) == 3
    )
    assert [turn.action for turn in first.turns] == ["search", "search", "answer"]
    assert (first.status, second.status) == ("answered", "answered")
    assert engine.log == [0, 1, 0, 0]
    assert retriever.calls == [["Silent Harbor"], ["Mira Talvek"]]
    assert (stats.searches, stats.queries, len(stats.latencies)) == (2, 2, 2)


def test_retrieval_and_generation_run_in_parallel(tokenizer):
    # The passages of rollout 0 arrive only after rollout 1 has been generated
    generated = threading.Event()

    class Slow(RecordingRetriever):
        def search(self, queries, k):
            assert generated.wait(30), "generation waits for the search"
            return super().search(queries, k)

    def ready(engine, number):
        if number == 1:
            generated.set()
        return number == 0 or engine.log == [0, 1]

    (first, second), *_ = roll_streaming(tokenizer, [[SEARCHES[0], SEARCHES[2]], SEARCHES[2:]], Slow(), ready)
    assert (first.status, second.status) == ("answered", "answered")


def test_queries_that_arrive_during_a_search_are_sent_together(tokenizer):
    # Rollout 0 searches first; all others have written their queries when its passages arrive
    all_written = threading.Event()

    class Slow(RecordingRetriever):
        def search(self, queries, k):
            assert all_written.wait(30)
            return super().search(queries, k)

    def ready(engine, number):
        if number == 3 and len(engine.log) == 4:
            all_written.set()
        return len(engine.calls) > number > 0 or number == 0 or len(engine.log) > 4

    queries = ["Silent Harbor", "Mira Talvek", "Mira Talvek", "Silent Harbor"]
    scripts = [[f"<search> {query}</search>", SEARCHES[2]] for query in queries]
    retriever = Slow()
    trajectories, stats, _ = roll_streaming(tokenizer, scripts, retriever, ready)
    assert [t.status for t in trajectories] == ["answered"] * 4
    assert [t.queries[0] for t in trajectories] == queries
    assert retriever.calls == [["Silent Harbor"], ["Mira Talvek"]]
    assert (stats.searches, stats.queries) == (4, 2)


def test_a_failed_search_during_generation_fails_only_its_own_rollouts(tokenizer):
    class FailsOnce(RecordingRetriever):
        def search(self, queries, k):
            result = super().search(queries, k)
            if len(self.calls) == 1:
                raise RetrievalError("gone", "timeout")
            return result

    (first, second), stats, _ = roll_streaming(
        tokenizer,
        [[SEARCHES[0]], [SEARCHES[1], SEARCHES[2]]],
        FailsOnce(),
        lambda engine, n: n == 0 or engine.calls != [],
    )
    assert (first.status, first.turns[0].retrieval) == ("retrieval_failed", "timeout")
    assert second.status == "answered"
    assert stats.failed_searches == {"timeout": 1}


@pytest.mark.parametrize("in_rounds", [True, False])
def test_malformed_passages_of_a_query_fail_only_its_rollouts(roll, tokenizer, in_rounds):
    class Odd(RecordingRetriever):
        def search(self, queries, k):
            return [[{"text": None}] if query == "Golden Mirror" else [PASSAGE] for query in queries]

    scripts = [
        [SEARCHES[0], SEARCHES[2]],
        ["<search> Golden Mirror</search>"],
        [SEARCHES[1], "<search> Golden Mirror</search>"],
    ]
    if in_rounds:
        trajectories, stats, *_ = roll(*scripts, retriever=Odd())
    else:
        trajectories, stats, _ = roll_streaming(tokenizer, scripts, Odd(), lambda engine, number: True)
    assert [t.status for t in trajectories] == ["answered", "retrieval_failed", "retrieval_failed"]
    assert [t.turns[-1].retrieval for t in trajectories] == [None, "error", "error"]
    assert trajectories[1].turns[-1].observation_ids == trajectories[2].turns[-1].observation_ids == []
    assert stats.failed_searches == {"reply": 2}
    assert "query 'Golden Mirror', passage 0" in str(stats.error)


def test_passages_may_be_dictionaries(roll):
    class Plain(RecordingRetriever):
        def search(self, queries, k):
            return ([{"id": 7, "title": PASSAGE.title, "text": PASSAGE.text, "score": 1}] for _ in queries)

    (t,), *_ = roll(["<search> Silent Harbor</search>", "<answer> Mira Talvek</answer>"], retriever=Plain())
    assert t.status == "answered"
    assert t.turns[0].passages == [PASSAGE]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_passages_with_scores_that_are_not_finite_are_not_trained_on(roll, score):
    retriever = RecordingRetriever(passages=[Passage("7", "", "x", score)])
    (t,), stats, *_ = roll(["<search> Silent Harbor</search>"], retriever=retriever)
    assert t.status == "retrieval_failed"
    assert stats.failed_searches == {"reply": 1}


def test_an_error_that_must_stop_training_is_raised_from_the_search_thread(tokenizer):
    retriever = RecordingRetriever(error=RetrievalLogError("the log lacks a query"))
    with pytest.raises(RetrievalLogError, match="lacks a query"):
        roll_streaming(tokenizer, [SEARCHES[:1]], retriever, lambda engine, n: True)


def test_the_context_length_of_the_engine_is_also_a_limit(tokenizer):
    prompt = tokenizer(QUESTION)["input_ids"]
    engine = ScriptedEngine(tokenizer, {tuple(prompt): ["<answer> " + "Mira " * 50]})
    engine.max_context_length = len(prompt) + 5
    loop = SearchLoop(engine, RecordingRetriever(), TagProtocol(tokenizer), eos_token_ids=[0], max_context_length=512)
    ((trajectory,), _) = loop.run([prompt])
    assert len(trajectory.completion_ids) == 5
    engine.max_context_length = len(prompt)
    with pytest.raises(ValueError, match=f"at most {len(prompt)} tokens"):
        loop.run([prompt])
