"""The recipes, run as a user runs them."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT
from helpers.servers import Server
from tspo_trl import read_rollouts
from tspo_trl.commands.errors import run_command
from tspo_trl.demo.warmup import LIMITS
from tspo_trl.questions.hints import in_flags
from tspo_trl.rollout.limits import SearchLimits
from tspo_trl.scoring import contains_answer, exact_match, normalize_answer

TRAIN = ROOT / "recipes" / "train.py"


def launch(*arguments, timeout=1200):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(TRAIN), *map(str, arguments)]
    if hasattr(os, "sched_setaffinity"):  # one core: other tests run at the same time, and threads that wait cost most
        core = max(os.sched_getaffinity(0))
        command = [
            sys.executable,
            "-c",
            f"import os, sys; os.sched_setaffinity(0, [{core}]); os.execv(sys.argv[1], sys.argv[1:])",
            *command,
        ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_the_demo_learns_to_search(tmp_path):
    """The main job, as `make train` runs it, with fewer steps."""
    steps = 100
    result = launch("--output_dir", tmp_path / "demo", "--max_steps", steps)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = dict(re.findall(r"│ ([A-Z][^│]*?) +│ +([\d.]+ │ +[\d.]+) │", result.stdout))
    table = {name: [float(v) for v in values.split("│")] for name, values in rows.items()}
    before, after = table["Exact match"]
    assert before <= 0.10
    assert after >= 0.30
    assert table["Near miss (found, answered wrong)"][0] > before
    assert table["Gold answer found (hit)"][1] > table["Gold answer found (hit)"][0]
    assert table["Groups all wrong"][1] < table["Groups all wrong"][0]

    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo")
    prompt = tokenizer("Question: Who wrote Silent Harbor?\n", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "<search> Silent Harbor</search>" in tokenizer.decode(output[0])
    rollouts = list(read_rollouts(tmp_path / "demo" / "trajectories" / "train-rank000.jsonl"))
    assert len(rollouts) == steps * 64


@pytest.mark.slow
def test_real_questions_and_passages(tmp_path):
    config = ROOT / "recipes" / "configs" / "hotpotqa_sample.yaml"
    steps = 4
    result = launch("--config", config, "--output_dir", tmp_path / "hotpotqa", "--max_steps", steps)
    assert result.returncode == 0, result.stderr[-4000:]
    history = json.loads((tmp_path / "hotpotqa" / "trainer_state.json").read_text())["log_history"]
    history = [entry for entry in history if "reward" in entry]
    assert len(history) == steps
    rollouts = list(read_rollouts(tmp_path / "hotpotqa" / "trajectories"))
    assert len(rollouts) == steps * 16
    hits = 0
    for step, entry in enumerate(history):
        # Counted again from what was written down, without the code that logs
        found, right = [], []
        for rollout in (r for r in rollouts if r["step"] == step):
            golds = [g for g in rollout["golden_answers"] if normalize_answer(g) not in ("", "yes", "no", "noanswer")]
            golds = [g for g in golds if len(normalize_answer(g)) > 1]
            passages = [p for turn in rollout["trajectory"].turns for p in turn.passages]
            found.append(any(contains_answer(p.title, golds) or contains_answer(p.text, golds) for p in passages))
            right.append(exact_match(rollout["trajectory"].answer, rollout["golden_answers"]))
        assert entry["search/hit"] == pytest.approx(sum(found) / 16)
        assert entry["reward"] == pytest.approx(sum(right) / 16)
        hits += sum(found)
    assert 0 < hits < steps * 16


@pytest.mark.slow
def test_the_recipe_with_a_server_gives_the_rollouts_of_the_embedded_retriever(tmp_path, policy_dir):
    options = [
        "--config",
        ROOT / "recipes" / "configs" / "demo.yaml",
        "--model_name_or_path",
        policy_dir,
        "--max_steps",
        2,
        "--max_eval_questions",
        4,
        "--disable_tqdm",
        "true",
        "--reward_funcs",
        "exact_match_reward",
        "format_reward",
        "--reward_weights",
        1.0,
        0.1,
    ]
    result = launch(*options, "--output_dir", tmp_path / "embedded")
    assert result.returncode == 0, result.stderr[-4000:]
    history = json.loads((tmp_path / "embedded" / "trainer_state.json").read_text())["log_history"]
    for entry in (entry for entry in history if "reward" in entry):
        exact, well_formed = (entry[f"rewards/{name}_reward/mean"] for name in ("exact_match", "format"))
        assert entry["reward"] == pytest.approx(exact + 0.1 * well_formed)
        assert well_formed > 0
    with Server("--corpus", "demo") as server:
        result = launch(*options, "--output_dir", tmp_path / "server", "--retriever_url", server.url)
    assert result.returncode == 0, result.stderr[-4000:]
    for name in ("train-rank000.jsonl", "eval-rank000.jsonl"):
        embedded, served = (tmp_path / run / "trajectories" / name for run in ("embedded", "server"))
        assert embedded.read_text() == served.read_text()
        assert any(turn.passages for rollout in read_rollouts(served) for turn in rollout["trajectory"].turns)


@pytest.fixture
def recipe():
    """The command as a module."""
    return importlib.import_module("tspo_trl.commands.train")


def test_metrics_without_a_value_do_not_stop_a_run(recipe, capsys):
    """TRL logs None where there is nothing to average."""
    key = "eval_rewards/exact_match_reward/mean"
    recipe.report({key: None}, {key: 0.5}, "Held-out questions")
    assert re.search(r"Exact match +│ +- │ +0.500 │", capsys.readouterr().out)


def test_only_files_that_exist_are_named(recipe, tmp_path, capsys):
    """With few steps, `logging_steps` may log none, and there are no curves."""
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=[]), args=SimpleNamespace(log_trajectories=True))
    recipe.report_run(trainer, None, None, tmp_path)
    shown = capsys.readouterr().out
    assert "Model: " in shown
    assert "Curves" not in shown
    assert "Trajectories" not in shown
    (tmp_path / "curves.png").write_bytes(b"")
    (tmp_path / "trajectories").mkdir()
    recipe.report_run(trainer, None, None, tmp_path)
    assert re.search(r"Curves: .*Trajectories: ", capsys.readouterr().out, re.DOTALL)


def test_errors_name_the_training_set_as_the_command_does(recipe):
    """For instance a question that is too long, which the trainer finds."""
    for names, shown in (("a.jsonl", "a.jsonl"), (["a.jsonl", "b c.jsonl"], "a.jsonl 'b c.jsonl'")):
        flags = recipe.trainer_flags(SimpleNamespace(dataset_name=names))
        assert in_flags("`train_dataset`, row 5: x", flags) == f"`--dataset_name {shown}`, row 5: x"


def test_names_with_markup_are_printed_as_they_are(recipe, tmp_path, capsys):
    history = [{"eval_br[/x]_reward": 0.5}]
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=history), num_generations_eval=4)
    folder = tmp_path / ("long" * 30) / "br[/x]"
    (folder / "trajectories").mkdir(parents=True)
    recipe.report_run(trainer, history[0], {"br[/x]": [1, 2]}, folder)
    shown = capsys.readouterr().out
    assert f"\nModel: {folder}\n" in shown
    assert f"\nTrajectories: {folder}/trajectories, as a page: tspo inspect '{folder}'\n" in shown
    assert "br[/x] (2, 4 sampled" in shown


def parse(recipe, *arguments):
    from trl import ModelConfig, TrlParser

    from tspo_trl import TSPOConfig

    parser = TrlParser((recipe.SearchArguments, TSPOConfig, ModelConfig))
    return parser.parse_args_and_config([*map(str, arguments), "--use_cpu", "true", "--bf16", "false"])[0]


@pytest.mark.parametrize("option", ["--dataset_name", "--dataset-name", "--dataset", "--dataset_nam", "="])
def test_the_settings_of_the_demo_are_for_the_demo_alone(recipe, option):
    common = ["--use_cpu", "true", "--bf16", "false"]
    script_args, training_args, model_args = recipe.parse_arguments(common)
    assert (script_args.dataset_name, model_args.model_name_or_path) == ("demo", "demo")
    assert training_args.learning_rate == 3e-4
    given = ["--dataset-name=mine.jsonl"] if option == "=" else [option, "mine.jsonl"]
    script_args, training_args, model_args = recipe.parse_arguments([*given, *common])
    assert (script_args.dataset_name, model_args.model_name_or_path) == ("mine.jsonl", None)
    assert training_args.learning_rate == 1e-6


@pytest.mark.parametrize(
    "name", ["eval_dataset_name", "model_name_or_path", "model", "corpus", "index", "retriever_url"]
)
def test_a_part_of_the_inputs_is_not_the_demo(recipe, name):
    script_args, _, _ = recipe.parse_arguments([f"--{name}", "x", "--use_cpu", "true", "--bf16", "false"])
    assert script_args.dataset_name is None


def test_other_spellings_are_read_from_a_file_too(recipe, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset: a.jsonl\nbackend: rank_bm25\nmodel: tiny\nmax-searches: 2\nuse_cpu: true\nbf16: false\n"
    )
    for option in (["--config", str(config)], [f"--config={config}"]):
        script_args, training_args, model_args = recipe.parse_arguments(option)
        assert (script_args.dataset_name, script_args.retriever_backend) == ("a.jsonl", "rank_bm25")
        assert (training_args.max_searches, model_args.model_name_or_path) == (2, "tiny")
    config.write_text("dataset: a.jsonl\ndataset_name: b.jsonl\n")
    with pytest.raises(ValueError, match="`dataset` and `dataset_name` are the same option"):
        recipe.parse_arguments(["--config", str(config)])


def write_questions(path, count, **more):
    path.parent.mkdir(exist_ok=True)
    rows = [{"question": f"{path.stem} {i}?", "golden_answers": [str(i)], **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_or_several_data_sets_can_be_named(recipe, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("dataset_name: [a.jsonl, b.jsonl]\ndataset_columns:\n  question: query\neval_dataset_name: nq\n")
    script_args = parse(recipe, "--config", config)
    assert script_args.dataset_name == ["a.jsonl", "b.jsonl"]
    assert script_args.dataset_columns == {"question": "query"}
    assert script_args.eval_dataset_name == ["nq"]
    script_args = parse(recipe, "--config", config, "--dataset_name", "c.jsonl", "--dataset_columns", '{"id": "n"}')
    assert script_args.dataset_name == "c.jsonl"
    assert script_args.dataset_columns == {"id": "n"}
    common = ["--use_cpu", "true", "--bf16", "false"]
    for flag in ("--dataset_columns", "--columns", "--dataset-columns"):
        script_args, _, _ = recipe.parse_arguments([flag, "question=query", "golden_answers=answers.text", *common])
        assert script_args.dataset_columns == {"question": "query", "golden_answers": "answers.text"}
    for wrong in ("question", "{question}"):
        with pytest.raises(ValueError, match=f"`dataset_columns` must be .*like OURS=THEIRS, got '{wrong}'"):
            parse(recipe, "--dataset_columns", wrong)


def test_data_sets_to_train_and_evaluate_on(recipe, tmp_path):
    a, b = write_questions(tmp_path / "a.jsonl", 6), write_questions(tmp_path / "b.jsonl", 4, n=1)
    train, evaluated = recipe.load_datasets(parse(recipe, "--dataset_name", a, b, "--max_train_questions", 5))
    assert train["data_source"][:] == ["a"] * 3 + ["b"] * 2
    assert evaluated is None  # files have no test split

    folder = tmp_path / "mine"
    write_questions(folder / "train.jsonl", 3), write_questions(folder / "test.jsonl", 2)
    train, evaluated = recipe.load_datasets(parse(recipe, "--dataset_name", folder, a, "--dataset_streaming", "true"))
    assert [row["data_source"] for row in train][:4] == ["mine", "a", "mine", "a"]
    assert [row["question"] for row in evaluated] == ["test 0?", "test 1?"]

    options = ["--dataset_name", a, "--eval_dataset_name", folder, b, "--max_eval_questions", 2]
    _, evaluated = recipe.load_datasets(parse(recipe, *options))
    assert {name: len(dataset) for name, dataset in evaluated.items()} == {"mine": 2, "b": 2}
    assert evaluated["mine"]["question"][:] == ["test 0?", "test 1?"]
    with pytest.raises(ValueError, match="`eval_dataset_name`: two data sets have the name 'b'"):
        recipe.load_datasets(parse(recipe, "--dataset_name", a, "--eval_dataset_name", b, b))


@pytest.mark.slow
def test_every_data_set_is_reported(tmp_path, policy_dir, world):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    rows = [question.row() for question in (*world.train_questions, *world.heldout_questions)]
    asked = [{"query": row["question"], "answers": {"text": row["golden_answers"]}} for row in rows]
    passages = write("passages.jsonl", [{"id": p.id, "title": p.title, "text": p.text} for p in world.passages])
    options = {
        "dataset_name": write("train.jsonl", asked[4:]),
        "eval_dataset_name": [write("near.jsonl", asked[:2]), write("far.jsonl", asked[2:4])],
        "dataset_columns": '{"question": "query", "golden_answers": "answers.text"}',
        "corpus": passages,
        "model_name_or_path": policy_dir,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_searches": 3,
        "max_turn_tokens": 12,
        "max_observation_tokens": 48,
        "max_completion_length": 160,
        "gradient_checkpointing": "false",
        "bf16": "false",
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": "true",
        "metric_for_best_model": "eval_far_hit",
    }
    arguments = [
        item
        for name, value in options.items()
        for item in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    result = launch(*arguments)
    assert result.returncode == 0, result.stderr[-4000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    shown = re.findall(
        r"(near|far) \(2, 4 sampled rollouts each\).*?Gold answer found \(hit\) +│ +([\d.]+) │",
        result.stdout,
        re.DOTALL,
    )
    start = {name: next(e for e in state["log_history"] if f"eval_{name}_hit" in e) for name in ("near", "far")}
    assert shown == [(name, f"{start[name][f'eval_{name}_hit']:.3f}") for name in ("near", "far")]
    best = max(e["eval_far_hit"] for e in state["log_history"] if "eval_far_hit" in e and e["step"] > 0)
    assert state["best_metric"] >= best - 1e-9


def test_the_demo_of_the_package_is_that_of_the_recipes(recipe):
    assert recipe.DEMO_CONFIG.read_text() == (ROOT / "recipes" / "configs" / "demo.yaml").read_text()


def test_the_paper_configurations_are_valid(recipe):
    from trl import ModelConfig, TrlParser

    from tspo_trl import TSPOConfig

    configs = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
    models = set()
    for config in configs:
        parser = TrlParser((recipe.SearchArguments, TSPOConfig, ModelConfig))
        overrides = ["--config", str(config), "--bf16", "false", "--use_cpu", "true"]
        script_args, training_args, model_args = parser.parse_args_and_config(overrides)
        if config.name == "demo.yaml":  # the warm start practises with the budgets of the training
            assert replace(SearchLimits.of(training_args), max_completion_length=4096) == LIMITS
        if config.name not in ("demo.yaml", "hotpotqa_sample.yaml"):
            assert script_args.dataset_name == "PeterJinGo/nq_hotpotqa_train"
            models.add(model_args.model_name_or_path)
            assert training_args.protocol == ("tags" if "Qwen2.5" in model_args.model_name_or_path else "tool_call")
            assert (training_args.max_searches, training_args.num_passages) == (4, 3)
            assert training_args.max_observation_tokens == 500
            assert 5 <= training_args.num_generations <= 8
            # vLLM cannot get the weights of a 4-bit model from TRL. The others generate all rollouts of a step at once
            assert training_args.use_vllm == (not model_args.load_in_4bit)
            if training_args.use_vllm:
                assert (training_args.vllm_mode, training_args.vllm_enable_sleep_mode) == ("colocate", True)
                assert training_args.vllm_max_model_length == 512 + training_args.max_completion_length
                assert training_args.steps_per_generation == training_args.gradient_accumulation_steps
    assert models == {
        *("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-4B", "Qwen/Qwen3.5-4B"),
        *("meta-llama/Llama-3.2-3B-Instruct", "google/gemma-4-E4B-it", "unsloth/gpt-oss-20b-BF16"),
    }


MODEL = ["--model_name_or_path", "demo"]
DATA = ["--dataset_name", "QUESTIONS", *MODEL]
CORPUS = ["--corpus", "CORPUS"]
DEAD = ["--retriever_url", "http://127.0.0.1:9"]  # would be asked for two minutes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--dataset_name", "nowhere.jsonl", *CORPUS], "there is no file 'nowhere.jsonl'"),
        ([*MODEL, "--dataset_name", "nowhere.jsonl", *DEAD], "there is no file 'nowhere.jsonl'"),
        ([*DATA, "--eval_dataset_name", "nowhere.csv", *DEAD], "--eval_dataset_name: there is no file 'nowhere.csv'"),
        (
            ["--dataset_name", "QUESTIONS", "--model", "runs/nowhere/checkpoint-5", *DEAD],
            "no folder 'runs/nowhere/checkp",
        ),
        (["--dataset_name", "QUESTIONS", "--model", "who/none", *DEAD], "'who/none' is not a folder here, and was not"),
        (DATA, "error: passages (--corpus, --index or --retriever_url) must be given"),
        ([*MODEL, *CORPUS], "error: questions (--dataset_name) must be given"),
        (["--dataset-name", "QUESTIONS", *CORPUS], "error: a model (--model_name_or_path) must be given"),
        (
            ["--retriever-url", "http://x"],
            "error: questions (--dataset_name) and a model (--model_name_or_path) must be",
        ),
        (["--resume_from_checkpoint", "true"], "There is no complete checkpoint in"),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` is 'nowhere'"),
        ([*DATA, "--index", "nowhere"], "no saved index in 'nowhere'"),
        ([*DATA, *CORPUS, "--retriever_backend", "elastic"], "'elastic'"),
        ([*DATA, *CORPUS, "--retriever_url", "http://x"], "not both"),
        ([*DATA, "--corpus", "BROKEN"], "broken.jsonl, line 2: not valid JSON"),
        ([*DATA, "--corpus", "EMPTY"], "has no passages"),
        ([*DATA, "--corpus", "nowhere.jsonl"], "--corpus: 'nowhere.jsonl' does not exist"),
        (["--protocol", "tool_call"], "`protocol` of the model 'demo' is 'tags', got 'tool_call'"),
        (["--use_vllm", "true"], "pip install 'tspo-trl[vllm]'"),
        (["--config", "recipes/configs/qwen2.5_7b_lora.yaml", *DEAD], "pip install 'tspo-trl[vllm]'"),
        (["--load_in_4bit", "true", "--use_peft", "true"], "pip install 'tspo-trl[quantization]'"),
        (["--report_to", "wandb"], "pip install wandb"),
        (["--report_to", "wandbb"], "`report_to` must be 'none', 'all' or some of ["),
        (["--use_liger_kernel", "true"], "pip install liger-kernel"),
        (
            [*DATA, *DEAD, "--eval_strategy", "steps"],
            "`eval_strategy` is 'steps', but there is no `eval_dataset` (`--ev",
        ),
        (
            [*DATA, *DEAD, "--dataset_streaming", "true"],
            "`max_steps` must be at least 1 with a streamed `--dataset_name ",
        ),
        ([*DATA, *CORPUS, "--output_dir", "/proc/x"], "`output_dir`: the folder '/proc/x' cannot be made"),
        ([*MODEL, "--dataset_name", "FEW", *DEAD, "--gradient_accumulation_steps", "2"], "Nothing would be trained"),
        (
            [*DATA, "--eval_dataset_name", "FEW", *DEAD, "--num_generations_eval", "3"],
            "a multiple of `num_generations_ev",
        ),
        (
            [*DATA, *CORPUS, "--num_generations", "3"],
            "generation_batch_size (8) must be divisible by num_generations (3)",
        ),
        (["--folr_alpha", "-1"], "`folr_alpha` must be at least 0, got -1"),
        (["--stop_on_collapse", "everything"], "`stop_on_collapse` must hold some of"),
        (["--config", "TYPES"], "`max_searches` must be a whole number, got [2]"),
        (["--max_serches", "2"], "unknown option --max_serches. Did you mean --max_searches?"),
        (["--max_searches", "many"], "invalid int value: 'many'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "UNKNOWN"], "unknown option `max_serches`. Did you mean max_searches?"),
        (["--output_dir", "CORPUS"], "passages.jsonl' is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_in_one_line(recipe, tmp_path, capfd, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    find_spec = recipe.find_spec
    monkeypatch.setattr(recipe, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    monkeypatch.setattr(recipe, "get_available_reporting_integrations", lambda: ["tensorboard"])
    sample = ROOT / "tests" / "data" / "hotpotqa"
    (tmp_path / "broken.jsonl").write_text('{"id": "0", "title": "a", "text": "b"}\n{"id": "1", oops\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    files = {
        "CORPUS": sample / "passages.jsonl",
        "QUESTIONS": sample / "questions.jsonl",
        "BROKEN": tmp_path / "broken.jsonl",
        "EMPTY": tmp_path / "empty.jsonl",
        "UNKNOWN": tmp_path / "unknown.yaml",
        "FEW": write_questions(tmp_path / "few.jsonl", 1),
        "TYPES": tmp_path / "types.yaml",
    }
    (tmp_path / "types.yaml").write_text("max_searches: [2]\n")
    (tmp_path / "unknown.yaml").write_text("dataset_name: demo\nmax_serches: 2\n")
    arguments = [str(files.get(a, a)) for a in arguments]
    output = [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        run_command(recipe.main, [*arguments, "--use_cpu", "--bf16", "false", *output])
    assert stopped.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert message in line
