"""The documentation: examples run, and links, names, options and messages match the code."""

import ast
import doctest
import os
import re
import runpy
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import import_module

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, ModelConfig

import tspo_trl
from helpers import families
from helpers.chats import make_chat
from helpers.paths import ROOT
from tspo_trl import Passage, TagProtocol, ToolCallProtocol, TSPOConfig
from tspo_trl.rollout.facts import RolloutFacts
from tspo_trl.rollout.stats import RolloutStats
from tspo_trl.training.collapse import WATCHES
from tspo_trl.training.metrics import retrieval_facts, retrieval_metrics, rollout_metrics

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def make_qwen(folder):
    """Save a tiny Qwen2 with a byte-level tokenizer and Qwen's chat format, in place of a model from the Hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["the search answer question"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_program(program, folder):
    """Run the code of a page in a folder, and return its output."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (name,) = re.findall(r'model="([^"]+)"', example)
    make_qwen(tmp_path / name)  # an existing relative path has priority over the Hub
    run_program(example, tmp_path)
    assert (tmp_path / "my-search-agent" / "trajectories" / "train-rank000.jsonl").is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "quickstart.md"], ids=lambda page: page.name)
def test_what_can_be_copied_fits_80_columns(page):
    text = page.read_text()
    fenced = re.findall(r"^```(?:bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"^    (?=\S).*$", rest, re.MULTILINE)
    assert len(lines) > 20
    assert [line for line in lines if len(line) > 80] == []


def blocks_of(page):
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_retriever_of_the_page_on_custom_code_works():
    names = {}
    for block in blocks_of("custom.md"):
        if "SQLiteRetriever" in block:
            exec(block, names)  # its asserts too
    assert names["retriever"].search(["novel by Jane Austen", "Hampshire"], 5)[0][0].title == "Emma (novel)"


@pytest.mark.slow
def test_the_program_of_the_page_on_custom_code_runs(tmp_path):
    program = "\n".join(blocks_of("custom.md"))
    (name,) = re.findall(r'model="([^"]+)"', program)
    make_qwen(tmp_path / name)
    small = "max_steps=1, max_turn_tokens=16, max_completion_length=128, max_observation_tokens=64, logging_steps=1,"
    program = (
        program.replace("max_steps=2,", small) + "\nprint([e for e in trainer.state.log_history if 'reward' in e])"
    )
    shown = run_program(program, tmp_path)
    for function in ("exact_match_reward", "format_reward", "few_searches_reward", "judge_reward"):
        assert f"rewards/{function}/mean" in shown
    assert "'extra_searches'" in shown


def test_the_quick_start_contains_the_example_of_the_readme():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example in (DOCS / "quickstart.md").read_text()


@pytest.mark.parametrize("page", ["algorithm.md", "protocols.md"])
def test_examples_of_the_pages_print_the_shown_output(page):
    results = doctest.testfile(str(DOCS / page), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_functions_named_in_the_architecture_are_in_the_stated_files():
    page = (DOCS / "architecture.md").read_text()
    rows = re.findall(r"^\| [^|]* \|([^|]*`[\w/]+\.py`[^|]*)\|([^|]*)\|$", page, re.MULTILINE)
    assert len(rows) > 40
    missing = []
    for place, names in rows:
        files = re.findall(r"`([\w/]+\.py)`", place + names)
        code = "\n".join((ROOT / "src" / "tspo_trl" / file).read_text() for file in files)
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                if not re.search(rf"(?:def|class) {part}\b|^ *{part}(?:: .+)? = ", code, re.MULTILINE):
                    missing.append((place, name))
    assert missing == []


def test_the_page_of_the_api_contains_every_public_name():
    names = re.findall(r"^::: tspo_trl\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(name for name in tspo_trl.__all__ if name != "__version__")


def test_the_page_of_the_options_is_up_to_date():
    page = runpy.run_path(str(DOCS / "write_configuration.py"))["write_current_page"]()
    assert (DOCS / "configuration.md").read_text() == page, "run `make docs`"


def test_the_page_of_the_options_contains_every_option_and_its_default():
    page = (DOCS / "configuration.md").read_text()
    for option in fields(TSPOConfig):
        if option.name not in {field.name for field in fields(GRPOConfig)}:
            default = "" if option.default in (None, MISSING) else f"defaults to `{option.default!r}`".replace("'", '"')
            assert re.search(rf"^### `{option.name}`\n\n`.*{re.escape(default)}", page, re.MULTILINE), option.name


@pytest.fixture(scope="module")
def options():
    """The options of `recipes/train.py`."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "train.py"))
    kinds = (recipe["SearchArguments"], TSPOConfig, ModelConfig)
    return {"config"} | {field.name for kind in kinds for field in fields(kind)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_recipe_accepts_the_flags_shown_in_the_pages(page, options):
    commands = re.findall(r"recipes/train\.py((?:[^\n`]|\\\n)*)", page.read_text())
    flags = [flag for command in commands for flag in re.findall(r" --(\w+)", command)]
    assert [flag for flag in flags if flag not in options] == []


def test_options_named_in_the_migration_page_exist(options):
    rows = re.findall(r"^\|(?! *-)[^|]*\|([^|]*)\|[^|]*\|$", (DOCS / "migration.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)", row) if not name.startswith("recipes")]
    assert len(named) > 40
    ours = options | {"retriever", "reward_funcs"}  # arguments of the trainer
    assert [name for name in named if name not in ours] == []


def messages_of_the_code():
    """Every string of the code, with … in place of each formatted value."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%\.?\d*[a-z]", "…", node.value)  # format specifiers of logging


def test_messages_of_the_troubleshooting_page_exist_in_the_code():
    said = list(messages_of_the_code())
    quoted = re.findall(r"```text\n(.*?)\n```", (DOCS / "troubleshooting.md").read_text(), re.DOTALL)
    assert len(quoted) > 20
    assert [message for message in quoted if not any(message in text for text in said)] == []


def test_metrics_of_the_troubleshooting_page_are_documented():
    known = (DOCS / "metrics.md").read_text()
    named = re.findall(
        r"`((?:search|groups|turns|retrieval|time|sampling|completions)/\w+(?:/\w+)*)`",
        (DOCS / "troubleshooting.md").read_text(),
    )
    assert len(named) > 10
    assert [name for name in named if f"`{name}`" not in known] == []


def test_rollouts_of_the_protocols_page_equal_the_text_that_the_model_reads():
    """The page marks this text with │."""
    page = (DOCS / "protocols.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
    tags, _, calls, _ = (re.sub("^│ ?", "", block, flags=re.MULTILINE) for kind, block in blocks if not kind)
    passages = [
        Passage("0", "Emma", "Emma is a novel by the English author Jane Austen."),
        Passage("1", "Jane Austen", "Jane Austen was born in Steventon, Hampshire, in 1775."),
    ]
    tokenizer = make_chat("qwen2_5")
    protocol = TagProtocol(tokenizer)
    observation = tokenizer.decode(protocol.observe(passages, 500).token_ids)
    assert f"</search>{observation}<think>" in tags
    protocol = ToolCallProtocol(tokenizer)
    observation = tokenizer.decode(protocol.observe(passages, 500).token_ids)
    assert f"</tool_call><|im_end|>{observation}Steventon<|im_end|>" in calls.replace("<|im_end|>\n\n", "<|im_end|>\n")


def test_the_table_of_the_protocols_page_is_that_of_the_families():
    assert families.table() in (DOCS / "protocols.md").read_text(), "run `python -m helpers.families`"


def test_the_protocols_page_names_every_template_that_is_refused():
    page = (DOCS / "protocols.md").read_text()
    refused = "\n".join(re.findall(r"^\| `\w+`[^|]*\|[^|]*\|$", page, re.MULTILINE))
    named = re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in refused.splitlines()))
    assert sorted(named) == sorted([*families.UNREADABLE, *families.WRONG])
    assert f"{len(named)} are\n[refused]" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("protocol", "module"), [("tags", "tags"), ("tool calls", "tool_call")])
def test_hints_of_the_protocols_page_equal_those_of_the_code(protocol, module):
    page = " ".join((DOCS / "protocols.md").read_text().replace("\n│ ", " ").split())
    assert import_module(f"tspo_trl.rollout.{module}").HINT in page


def test_every_metric_and_every_warning_is_documented():
    text = (DOCS / "metrics.md").read_text()
    some = {"num_generations": 1, "success_threshold": 1.0}
    ours = rollout_metrics(
        torch.zeros(1, len(RolloutFacts._fields)), torch.zeros(1), torch.ones(1) > 0, torch.zeros(1), **some
    )
    ours |= retrieval_metrics(torch.tensor([retrieval_facts(RolloutStats(), cached=0, retries=0, max_calls=1)]))
    assert [name for name in ours if f"`{name}`" not in text] == []
    for watch in WATCHES:
        assert re.search(rf"^\| `{watch.kind}` \| `{watch.metric}`", text, re.MULTILINE), watch.kind
