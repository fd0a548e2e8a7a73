"""Training with a real retrieval server that is killed, slowed down or returns garbage during the run."""

import json
import threading
from pathlib import Path

import httpx2
import pytest
from transformers import TrainerCallback

from helpers.paths import HELPERS
from helpers.servers import Server
from tspo_trl import CachedRetriever, HTTPRetriever, RetrievalError, read_rollouts

FAULTY = HELPERS / "faulty_server.py"


@pytest.fixture(scope="module")
def corpus(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "passages.jsonl"
    lines = [json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in world.passages]
    path.write_text("\n".join(lines))
    return path


class At(TrainerCallback):
    """Calls a function at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def make_run(make_trainer, tmp_path):
    """A function that makes a trainer with its own output folder."""

    def make(name, retriever, **options):
        return make_trainer(
            retriever=retriever,
            reward_funcs=length_reward,  # varies within the groups, so that every step changes the weights
            **{"output_dir": str(tmp_path / name), "max_steps": 6, "retrieval_cache_size": 0, **options},
        )

    return make


def length_reward(trajectories, **kwargs):
    return [float(len(t.turns[0].token_ids) % 4) for t in trajectories]


def rollouts(trainer):
    return (Path(trainer.args.output_dir) / "trajectories" / "train-rank000.jsonl").read_text().splitlines()


def metric(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def undisturbed(make_run, retriever):
    """A run with the retriever in the same process."""
    trainer = make_run("undisturbed", retriever)
    trainer.train()
    assert len(rollouts(trainer)) == 6 * 8
    return trainer


def assert_same_run(trainer, other):
    assert rollouts(trainer) == rollouts(other)
    for (name, ours), (_, theirs) in zip(trainer.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert ours.equal(theirs), name


@pytest.mark.slow
def test_a_run_with_a_server_and_an_outage_equals_a_local_run(make_run, undisturbed, corpus):
    """The server is killed during the run and restarted a few seconds later."""
    with Server("--corpus", corpus) as server:

        def outage():
            server.kill()
            threading.Timer(4.0, server.start).start()

        client = HTTPRetriever(server.url)
        trainer = make_run("outage", client, callbacks=[At(3, outage)])
        trainer.train()
        assert client.retries > 0
        assert sum(metric(trainer, "retrieval/retries")) == client.retries
        assert metric(trainer, "search/failed") == [0.0] * 6
        assert_same_run(trainer, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("slow", "timeout"), ("garbage", "reply"), ("too few", "reply"), ("500", "status"), ("cut", "connection")],
)
def test_short_failures_are_retried_and_long_failures_are_marked(make_run, undisturbed, corpus, mode, kind):
    with Server("--corpus", corpus, script=FAULTY) as server:

        def misbehave(left):
            httpx2.post(f"{server.url}/mode", json={"mode": mode, "left": left})

        client = HTTPRetriever(server.url, timeout=0.7, total_timeout=30)
        short = make_run("short", client, callbacks=[At(2, lambda: misbehave(2))])
        short.train()
        assert client.retries == 2
        assert_same_run(short, undisturbed)

        client = HTTPRetriever(server.url, timeout=0.7, total_timeout=1.5)
        trouble = [At(2, lambda: misbehave(-1)), At(3, lambda: httpx2.post(f"{server.url}/mode", json={"mode": "ok"}))]
        trainer = make_run("long", client, callbacks=trouble, max_retrieval_failure_rate=1.0)
        trainer.train()
        assert trainer.state.global_step == 6
        assert metric(trainer, "search/failed") == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
        failed = metric(trainer, f"retrieval/failed_{kind}")
        assert failed[2] > 0
        assert failed[:2] + failed[3:] == [0.0] * 5
        marked = [r for r in read_rollouts(Path(trainer.args.output_dir) / "trajectories") if r["step"] == 2]
        searched = [r for r in marked if any(turn.retrieval for turn in r["trajectory"].turns)]
        assert len(searched) > 0
        for rollout in searched:
            assert rollout["trajectory"].status == "retrieval_failed"
            assert rollout["trajectory"].turns[-1].retrieval == ("timeout" if kind == "timeout" else "error")
            assert not any(rollout["turn_advantages"])


@pytest.mark.slow
def test_a_run_stopped_by_a_dead_server_resumes_exactly(make_run, undisturbed, corpus):
    with Server("--corpus", corpus) as server:
        client = HTTPRetriever(server.url, total_timeout=1.0)
        trainer = make_run("stopped", client, callbacks=[At(3, server.kill)])
        with pytest.raises(RetrievalError, match=rf"HTTPRetriever\('{server.url}/retrieve'\).*resume_from_checkpoint"):
            trainer.train()
        assert trainer.state.global_step == 3
        folder = Path(trainer.args.output_dir)
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
        assert len(rollouts(trainer)) == 3 * 8  # no rollout of the failed step was kept
        server.start().wait_until_ready()
        resumed = make_run("stopped", client)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert_same_run(resumed, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"steps_per_generation": 1}, {"steps_per_generation": 4}, {"num_iterations": 2}])
def test_resuming_with_accumulated_generations(make_run, retriever, options):
    """The failed step may have generated rollouts before, or use rollouts of an earlier step."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **options}
    options["max_retrieval_failure_rate"] = 0.0  # the first failure stops the run

    class Down:
        calls, down = 0, False

        def search(self, queries, k):
            self.calls += 1
            if self.down and self.calls > 6:
                raise ConnectionError("down")
            return retriever.search(queries, k)

    whole = make_run("whole", Down(), **options)
    whole.train()
    down = Down()
    down.down = True
    stopped = make_run("stopped", down, **options)
    with pytest.raises(RetrievalError, match="continues from here"):
        stopped.train()
    assert 0 < stopped.state.global_step < 6
    resumed = make_run("stopped", retriever, **options)
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_an_outage_during_an_evaluation_keeps_the_checkpoint(make_run, retriever, dataset):
    class Down:
        down = False

        def search(self, queries, k):
            if self.down:
                raise ConnectionError("down")
            return retriever.search(queries, k)

    down = Down()

    class AtTheEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            down.down = state.global_step == 4

    options = {"eval_dataset": dataset.select(range(2)), "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    trainer = make_run("evaluated", down, callbacks=[AtTheEnd()], save_strategy="steps", **options)
    with pytest.raises(RetrievalError, match="resume_from_checkpoint"):
        trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]


# Repeating a run


@pytest.mark.slow
def test_a_run_is_repeated_from_its_log_without_the_retriever(make_run, undisturbed, corpus, tmp_path):
    log = str(tmp_path / "log")
    with Server("--corpus", corpus) as server:
        recorded = make_run("recorded", HTTPRetriever(server.url), retrieval_log=log)
        recorded.train()
    assert_same_run(recorded, undisturbed)
    repeated = make_run("repeated", None, retrieval_log=log)
    repeated.train()
    assert_same_run(repeated, undisturbed)


@pytest.mark.slow
def test_a_repeated_run_repeats_failures(make_run, retriever, tmp_path):
    class Flaky:
        calls = 0

        def search(self, queries, k):
            self.calls += 1
            if self.calls in (4, 5, 9):
                raise TimeoutError("busy")
            return retriever.search(queries, k)

    log = str(tmp_path / "log")
    recorded = make_run("recorded", Flaky(), retrieval_log=log, max_retrieval_failure_rate=1.0)
    recorded.train()
    assert sum(metric(recorded, "retrieval/failed_timeout")) > 0
    repeated = make_run("repeated", None, retrieval_log=log, max_retrieval_failure_rate=1.0)
    repeated.train()
    assert_same_run(repeated, recorded)


@pytest.mark.slow
def test_a_stopped_and_resumed_run_can_be_repeated(make_run, retriever, tmp_path):
    class Down:
        calls = 0

        def search(self, queries, k):
            self.calls += 1
            if self.calls > 7:
                raise ConnectionError("down")
            return retriever.search(queries, k)

    log = str(tmp_path / "log")
    with pytest.raises(RetrievalError):
        make_run("recorded", Down(), retrieval_log=log).train()
    recorded = make_run("recorded", retriever, retrieval_log=log)
    recorded.train(resume_from_checkpoint=True)
    repeated = make_run("repeated", None, retrieval_log=log)
    repeated.train()
    assert_same_run(repeated, recorded)


def test_another_run_cannot_be_repeated_from_the_log(make_run, retriever, tmp_path):
    log = str(tmp_path / "log")
    make_run("recorded", retriever, retrieval_log=log, max_steps=1).train()
    with pytest.raises(RuntimeError, match="is not in the retrieval log"):
        make_run("repeated", None, retrieval_log=log, max_steps=1, num_passages=1).train()


def test_a_log_or_a_retriever_is_needed(make_run, tmp_path):
    with pytest.raises(ValueError, match="`retriever` must be"):
        make_run("none", None)
    with pytest.raises(FileNotFoundError, match="no retrieval log"):
        make_run("none", None, retrieval_log=str(tmp_path / "nothing"))


# Caches and metrics


def test_a_cache_changes_only_the_number_of_calls(make_run, undisturbed, retriever, tmp_path):
    class Counting:
        fingerprint = retriever.fingerprint
        queries = 0

        def search(self, queries, k):
            self.queries += len(queries)
            return retriever.search(queries, k)

    counting = Counting()
    options = {"retrieval_cache_size": 1000, "retrieval_cache_dir": str(tmp_path / "cache")}
    first = make_run("first", counting, **options)
    counting.queries = 0  # without the trial search
    first.train()
    assert_same_run(first, undisturbed)
    asked = counting.queries
    assert asked == first.rollout_func.retrievers.cache.misses > 0
    second = make_run("second", counting, **options)
    counting.queries = asked
    second.train()
    assert_same_run(second, undisturbed)
    assert counting.queries == asked
    assert metric(second, "retrieval/cached") == [1.0] * 6


def test_retrieval_metrics_agree_with_the_rollouts(make_run, retriever):
    calls = []

    class Watching:
        def search(self, queries, k):
            calls.append(list(queries))
            return retriever.search(queries, k)

    trainer = make_run("watched", Watching(), max_steps=2)
    assert isinstance(trainer.search_loop.retriever, CachedRetriever)
    assert calls == [["test"]]  # the trial search
    calls.clear()
    trainer.train()
    records = list(read_rollouts(Path(trainer.args.output_dir) / "trajectories"))
    for step in range(2):
        searches = [
            turn.content
            for record in records
            if record["step"] == step
            for turn in record["trajectory"].turns
            if turn.retrieval is not None
        ]
        assert metric(trainer, "retrieval/searches")[step] == len(searches)
        assert metric(trainer, "retrieval/unique")[step] == pytest.approx(len(set(searches)) / len(searches))
    assert sum(metric(trainer, "retrieval/calls")) == len(calls)
    assert metric(trainer, "retrieval/cached") == [0.0, 0.0]
    for p50, p95, total in zip(
        *(metric(trainer, name) for name in ("retrieval/latency_p50", "retrieval/latency_p95", "time/search")),
        strict=True,
    ):
        assert 0 < p50 <= p95 <= total
