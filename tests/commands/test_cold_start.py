"""The command of the cold start, as a user runs it."""

import json
import os
import re
import shutil
import signal

import pytest
from transformers import AutoModelForCausalLM

from helpers.families import make_family_protocol
from helpers.paths import HOTPOTQA, ROOT
from helpers.tag_protocols import make_bytes
from tspo_trl import BM25Retriever, ColdStartTrainer, SearchAgent, SearchConfig, load_questions, make_demonstrations
from tspo_trl.commands.cold_start import example_lines, load_rows, main, parse_arguments
from tspo_trl.commands.errors import run_command
from tspo_trl.commands.main import main as tspo
from tspo_trl.demo import make_model

OPTIONS = {
    "max_searches": 2,
    "num_passages": 2,
    "max_turn_tokens": 150,
    "max_query_tokens": 140,
    "max_observation_tokens": 500,
    "per_device_train_batch_size": 4,
    "num_demonstrations": 8,
    "check_questions": 2,
    "gradient_checkpointing": "false",
    "use_cpu": "true",
    "report_to": "none",
    "disable_tqdm": "true",
}
DATA = ["--dataset_name", str(HOTPOTQA / "questions.jsonl"), "--corpus", str(HOTPOTQA / "passages.jsonl")]


def flags(options):
    return [str(item) for name, value in options.items() for item in (f"--{name}", value)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny model that is not trained, with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_bytes()
    make_model(tokenizer, hidden_size=16, num_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
def test_the_command_makes_a_model(tmp_path, model_dir, capsys, monkeypatch, adapter):
    monkeypatch.setattr("tspo_trl.commands.cold_start.use_all_cores", lambda: None)  # other tests run at the same time
    out = tmp_path / "cold"
    options = {**OPTIONS, "model_name_or_path": model_dir, "output_dir": out, "failed_share": 0.25}
    if adapter:
        options |= {"use_peft": "true", "lora_target_modules": "all-linear"}
    # without the dash: both spellings are the same command
    tspo(["cold-start" if adapter else "cold_start", *DATA, *flags(options)])
    shown = capsys.readouterr().out
    searched, found = map(int, re.search(r"Questions: (\d+) searched for, (\d+) with evidence", shown).groups())
    assert 8 <= found < searched <= 46
    assert re.search(r"Demonstrations: 8 \(\d find all supporting titles, 2 begin with a failed search\)", shown)
    assert re.search(r"^▶ <answer> .* </answer>$", shown, re.MULTILINE)
    assert re.search(r"^│ <information>Doc 1", shown, re.MULTILINE)
    assert re.search(r"Loss: \d\.\d+ at step 1, \d\.\d+ at step 2", shown)
    assert "Held-out questions (2, greedy)" in shown
    assert re.search(r"Rollouts that search +│ +\d\.\d+ │ +\d\.\d+ │", shown)
    assert f"tspo train --model_name_or_path {out} --protocol tags" in shown.replace("\n", "")
    config = SearchConfig.load(out)
    assert (config.max_searches, config.num_passages) == (2, 2)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_dir, out))
    changed = [
        name
        for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not a.equal(b)
    ]
    assert len(changed) > 5
    assert (out / "adapter" / "adapter_config.json").exists() == adapter
    agent = SearchAgent.from_pretrained(out, retriever=BM25Retriever.from_jsonl(DATA[-1]), device="cpu")
    assert agent.config == config


def test_an_interrupted_run_is_resumed(tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setattr("tspo_trl.commands.cold_start.use_all_cores", lambda: None)
    options = {
        **OPTIONS,
        "model_name_or_path": model_dir,
        "check_questions": 0,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main([*DATA, *flags(options | {"output_dir": whole})])
    shutil.copytree(whole / "checkpoint-1", resumed / "checkpoint-1")
    main([*DATA, *flags(options | {"output_dir": resumed}), "--resume_from_checkpoint", "true"])
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert (whole / "model.safetensors").read_bytes() != (whole / "checkpoint-1" / "model.safetensors").read_bytes()


def test_a_signal_stops_the_run_with_a_checkpoint(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr("tspo_trl.commands.cold_start.use_all_cores", lambda: None)
    step = ColdStartTrainer.training_step

    def step_with_signal(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(ColdStartTrainer, "training_step", step_with_signal)
    options = {**OPTIONS, "model_name_or_path": model_dir, "check_questions": 0, "output_dir": tmp_path / "out"}
    with pytest.raises(SystemExit) as stopped:
        main([*DATA, *flags(options)])
    assert stopped.value.code == 143
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_example_marks_what_is_learned():
    protocol = make_family_protocol("qwen2_5")
    rows = load_questions(DATA[1])
    made = make_demonstrations(
        rows,
        BM25Retriever.from_jsonl(DATA[-1]),
        protocol,
        eos_token_ids=[protocol.tokenizer.eos_token_id],
        num_demonstrations=4,
        failed_share=1.0,
    )
    one = next(one for one in made.items if one.num_failed)
    lines = [line.plain for line in example_lines(one, protocol)]
    learned = [line for line in lines if line.startswith("▶")]
    # the failed search is read, the others are learned
    assert sum("<tool_call>" in line for line in learned) == len(one.trajectory.turns) - 2
    assert [line for line in learned if one.trajectory.answer in line] == [f"▶ {one.trajectory.answer}<|im_end|>"]
    assert any(line.startswith("│ Doc 1") for line in lines)
    assert max(map(len, lines)) <= 162


def test_held_out_questions_are_not_demonstrated(tmp_path):
    args, _, _ = parse_arguments([*DATA, "--model", "m", "--use_cpu", "true", "--check_questions", "5"])
    dataset, heldout = load_rows(args, seed=0)
    questions = set(dataset["question"])
    assert (len(dataset), len(heldout)) == (43, 5)
    assert questions.isdisjoint(row["question"] for row in heldout)
    args, _, _ = parse_arguments([*DATA, "--model", "m", "--use_cpu", "true", "--check_questions", "40"])
    assert len(load_rows(args, seed=0)[1]) == 12  # a quarter
    args, config, _ = parse_arguments([*DATA, "--model", "m", "--use_cpu", "true", "--dataset_streaming", "true"])
    dataset, heldout = load_rows(args, seed=0)
    assert len(heldout) == 16
    assert {row["question"] for row in dataset}.isdisjoint(row["question"] for row in heldout)
    assert config.output_dir == "runs/cold_start"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "CORPUS"], "questions (--dataset_name) and a model (--model_name_or_path) must be given"),
        (
            ["--dataset_name", "QUESTIONS", "--model", "m"],
            "passages (--corpus, --index or --retriever_url) must be given",
        ),
        ([*DATA, "--model", "runs/nowhere/cold"], "--model_name_or_path: there is no folder 'runs/nowhere/cold'"),
        ([*DATA, "--model", "who/none"], "'who/none' is not a folder here, and was not found on the Hub"),
        ([*DATA, "--model", "MODEL", "--report_to", "wandbb"], "`report_to` must be 'none', 'all' or some of ["),
        ([*DATA, "--model", "MODEL", "--use_liger_kernel", "true"], "pip install liger-kernel"),
        ([*DATA, "--model", "MODEL", "--eval_strategy", "steps"], "`eval_strategy` must be 'no', got 'steps'"),
        ([*DATA, "--model", "MODEL", "--output_dir", "/proc/x"], "`output_dir`: the folder '/proc/x' cannot be made"),
        ([*DATA, "--model", "demo"], "The demo has a cold start of its own: run `tspo train`"),
        ([*DATA, "--model", "MODEL", "--load_in_4bit", "true"], "an adapter cannot be merged exactly"),
        ([*DATA, "--model", "MODEL", "--check_questions", "-1"], "`check_questions` must not be negative"),
        ([*DATA, "--model", "MODEL", "--protocol", "tool_call"], "needs a chat template, but the tokenizer has none"),
        (
            [*DATA, "--model", "MODEL", "--max_serches", "2"],
            "unknown option --max_serches. Did you mean --max_searches?",
        ),
        (["--dataset_name", "QUESTIONS", "--corpus", "ELSEWHERE", "--model", "MODEL"], "(hit@3 is 0)"),
        (["--dataset_name", "FEW", "--corpus", "CORPUS", "--model", "MODEL"], "There are too few demonstrations"),
        ([*DATA, "--model", "MODEL", "--resume_from_checkpoint", "true"], "is 'true', but there is no such checkpoint"),
        ([*DATA, "--model", "MODEL", "--output_dir", "CORPUS"], "`output_dir` must be a folder"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_bad_input_is_named_in_one_line(tmp_path, model_dir, capfd, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    (tmp_path / "elsewhere.jsonl").write_text('{"id": "0", "title": "Rome", "text": "Rome is a city."}\n')
    rows = [json.loads(line) for line in (HOTPOTQA / "questions.jsonl").read_text().splitlines()]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    files = {
        "CORPUS": HOTPOTQA / "passages.jsonl",
        "QUESTIONS": HOTPOTQA / "questions.jsonl",
        "ELSEWHERE": tmp_path / "elsewhere.jsonl",
        "FEW": tmp_path / "few.jsonl",
        "MODEL": model_dir,
    }
    arguments = [str(files.get(argument, argument)) for argument in arguments]
    output = [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run_command(main, [*arguments, "--use_cpu", "true", *output])
    assert stopped.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert message in line
