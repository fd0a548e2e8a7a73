"""The options of the commands of training, from flags and YAML files."""

import pytest

from tspo_trl.commands import cold_start, train
from tspo_trl.commands.errors import run_command

COMMON = ["--dataset_name", "q.jsonl", "--model", "tiny", "--corpus", "p.jsonl", "--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses a command line, with a YAML file as its configuration."""
    monkeypatch.chdir(tmp_path)

    def parse(*arguments, text=None, command=train):
        config = []
        if text is not None:
            (tmp_path / "run.yaml").write_text(text)
            config = ["--config", "run.yaml"]
        named = {line.split(":")[0] for line in (text or "").splitlines()} | {one.lstrip("-") for one in arguments}
        pairs = zip(COMMON[::2], COMMON[1::2], strict=True)
        common = [item for flag, value in pairs if flag.lstrip("-") not in named for item in (flag, value)]
        return command.parse_arguments([*common, *config, *arguments])

    return parse


@pytest.mark.parametrize(
    "line",
    [
        *("dataset_name: 5", "dataset_name: [q.jsonl, 5]", "dataset_name: {a: b}", "eval_dataset_name: 3"),
        *("corpus: 3", "corpus: [p.jsonl]", "index: 5", "model_name_or_path: 3", "output_dir: 3"),
        *("max_steps: null", "max_steps: [1]", "max_steps: 1.5", "seed: null", "seed: 1.5"),
        *("model_init_kwargs: 3", "reward_funcs: 3", "reward_funcs: [3]", "reward_weights: 1.0"),
        *("reward_weights: [a]", "dataset_columns: 3", "dataset_columns: {question: 3}", "dataset_train_split: 3"),
        *("max_train_questions: 2.5", "lora_r: null", "learning_rate: .nan", "use_peft: 1", "retriever_url: true"),
    ],
)
def test_a_value_of_a_wrong_type_names_file_and_key(parse, line):
    with pytest.raises(ValueError, match=f"^run.yaml: `{line.split(':')[0]}` must be .*, got "):
        parse(text=line)


@pytest.mark.parametrize(
    "line", ["failed_share: null", "check_questions: null", "dataset_name: 5", "lora_alpha: {x: 1}"]
)
def test_the_cold_start_checks_its_file_too(parse, line):
    with pytest.raises(ValueError, match=f"^run.yaml: `{line.split(':')[0]}` must be "):
        parse(text=line, command=cold_start)


def test_words_that_yaml_reads_as_booleans_are_explained(parse):
    with pytest.raises(ValueError, match=r"`eval_strategy` must be one of .*'no'.*, got False. Put it in quotes"):
        parse(text="eval_strategy: no")


@pytest.mark.parametrize("name", ["generation_kwargs", "model_init_kwargs", "chat_template_kwargs"])
def test_a_mapping_that_is_no_json_object_is_named(parse, name):
    for value in ("abc", "{bad", "[1]"):
        with pytest.raises(ValueError, match=f"`{name}` must be a JSON object"):
            parse(f"--{name}", value)


def test_values_that_fit_are_kept(parse):
    text = (
        "learning_rate: 1e-5\nmax_steps: 3\nsave_steps: 0.5\nreward_weights: [1, 0.5]\nresume_from_checkpoint: true\n"
    )
    text += "dataset_columns: [question=query]\nreport_to: none\nscale_rewards: false\neval_dataset_name: nq\n"
    script_args, args, _ = parse(text=text)
    assert (args.learning_rate, args.max_steps, args.reward_weights) == (1e-5, 3, [1, 0.5])
    assert (script_args.dataset_columns, script_args.eval_dataset_name) == ({"question": "query"}, ["nq"])


@pytest.mark.parametrize("command", [train, cold_start])
def test_a_file_resumes_as_the_flag_does(parse, tmp_path, monkeypatch, command):
    for given in ({"text": "resume_from_checkpoint: true"}, {}):
        _, args, _ = parse(*([] if given else ["--resume_from_checkpoint", "true"]), **given, command=command)
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
        monkeypatch.setattr(train, "last_checkpoint", lambda folder: str(folder / "checkpoint-1"))
        found = command.find_checkpoint(args.resume_from_checkpoint, tmp_path)
        assert found == str(tmp_path / "checkpoint-1")
    assert command.find_checkpoint(False, tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_searches: 2\nmax-searches: 3", "`max_searches` and `max-searches` are the same option"),
        ("model: a\nmodel_name_or_path: b", "`model` and `model_name_or_path` are the same option"),
        ("max_searches: 2\nmax_searches: 3", "`max_searches` is given twice"),
    ],
)
def test_an_option_is_given_once(parse, text, message):
    with pytest.raises(ValueError, match=f"^run.yaml: {message}"):
        parse(text=text)


def test_a_file_that_cannot_be_read_is_named(parse, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in ((".", "it is a folder"), ("binary", "in UTF-8"), ("nowhere.yaml", "No such file")):
        with pytest.raises((ValueError, OSError), match=f"^--config: '{name}' .*{reason}"):
            parse("--config", name)


@pytest.mark.parametrize(
    "name", ["dataset_name", "eval_dataset_name", "model", "corpus", "output_dir", "retriever_url"]
)
def test_empty_names_are_refused(parse, name):
    option = "model_name_or_path" if name == "model" else name
    with pytest.raises(ValueError, match=f"`{option}` must not be empty"):
        parse(f"--{name}", "")


@pytest.mark.parametrize("command", [train, cold_start])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--max_steps", "0"], "max_steps"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs"),
        (["--max_steps", "-1", "--num_train_epochs", "-1"], "num_train_epochs"),
        (["--lora_r", "0"], "lora_r"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
    ],
)
def test_a_run_that_would_train_nothing_ends_with_one_line(tmp_path, monkeypatch, capfd, command, arguments, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main, [*COMMON, *arguments])
    assert stopped.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert f"`{name}` must be" in line
    assert arguments[-1] in line


def test_warm_start_steps_are_not_negative(parse):
    with pytest.raises(ValueError, match="`warm_start_steps` must be at least 0, got -5"):
        parse("--warm_start_steps", "-5")
