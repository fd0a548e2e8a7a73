"""The facts of a run that the model card shows, and the private ones that it omits."""

import re
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_from_disk
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl.trainer.utils import generate_model_card

from tspo_trl import HTTPRetriever, SearchConfig, TSPOConfig
from tspo_trl.sharing.model_card import extend_model_card
from tspo_trl.sharing.training_facts import TrainingFacts, evaluations, hub_id, non_default_options


def rows(count, **columns):
    return Dataset.from_list([{"question": "Who?", "golden_answers": ["Ann"], **columns} for _ in range(count)])


def make_args(**options):
    return TSPOConfig(output_dir="/home/ann/runs/secret", use_cpu=True, bf16=False, **options)


def make_facts(**values):
    known = {
        "model": "ann/agent",
        "base_model": "Qwen/Qwen2.5-3B",
        "adapter": None,
        "args": make_args(),
        "search_config": SearchConfig(),
        "retriever": SimpleNamespace(),
        "train_dataset": rows(3),
        "eval_dataset": None,
        "dataset_names": [],
        "log_history": [],
        "step": 100,
        "processes": "one process",
    }
    return TrainingFacts(**{**known, **values})


def make_card(**values):
    """The card after it has been written and read back."""
    card = generate_model_card(
        base_model=None,
        model_name="agent",
        hub_model_id="ann/agent",
        dataset_name=None,
        tags=["trl"],
        wandb_url=None,
        trackio_url=None,
        trainer_name="TSPO",
        trainer_citation="@article{ma2026tspo}",
        paper_title="TSPO",
        paper_id="2601.22776",
    )
    extend_model_card(card, make_facts(**values))
    return ModelCard(str(card))


def collapsed(text):
    """The text with each run of spaces replaced by one space, because table cells are padded."""
    return re.sub(" +", " ", text)


EVALUATED = [
    {"step": 0, "eval_nq_em": 0.1, "eval_nq_hit": 0.3, "eval_nq_reward": 0.1},
    {"step": 0, "eval_nq_dev_em": 0.2, "eval_nq_dev_hit": 0.4, "eval_nq_dev_reward": 0.7},
    {"step": 50, "reward": 0.5, "search/hit": 0.6},
    {"step": 90, "eval_nq_em": 0.35, "eval_nq_hit": 0.55, "eval_nq_reward": 0.35},
    {"step": 90, "eval_nq_dev_em": 0.45, "eval_nq_dev_hit": 0.65, "eval_nq_dev_reward": 0.75},
    {"step": 200, "eval_nq_em": 0.9, "eval_nq_hit": 0.9, "eval_nq_reward": 0.9},
]


def test_model_index_contains_the_last_results_of_every_data_set():
    card = make_card(eval_dataset={"nq": rows(2), "nq_dev": rows(1)}, log_history=EVALUATED)
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("nq", "exact_match"): 0.35,  # not the one of step 200, because the weights are those of step 100
        ("nq", "hit_rate"): 0.55,
        ("nq_dev", "exact_match"): 0.45,
        ("nq_dev", "hit_rate"): 0.65,
        ("nq_dev", "reward"): 0.75,  # the reward of the other set equals its exact match and is not repeated
    }
    assert card.data.metrics == ["exact_match"]
    assert "### nq\n" in card.text
    assert "| | before training | step 90 |" in collapsed(card.text)
    assert "| Exact match | 0.100 | 0.350 |" in collapsed(card.text)


def test_a_single_evaluation_set_is_read_from_keys_without_a_name():
    log = [
        {
            "step": 100,
            "eval_rewards/exact_match_reward/mean": 0.25,
            "eval_search/hit": 0.5,
            "eval_search/calls": float("nan"),
        }
    ]
    (evaluation,) = evaluations(make_facts(eval_dataset=rows(2), log_history=log))
    assert (evaluation.name, evaluation.step, evaluation.before) == ("Held-out questions", 100, {})
    assert [(r.metric_type, r.metric_value) for r in evaluation.results] == [("exact_match", 0.25), ("hit_rate", 0.5)]


def test_without_an_evaluation_training_metrics_are_labelled_as_such():
    log = [{"step": step, "reward": step / 100, "search/hit": 0.5} for step in range(1, 101)]
    card = make_card(log_history=log)
    assert card.data.eval_results is None
    assert "No evaluation was run. On the training questions, the mean of the last 10 log entries" in card.text
    assert "| Reward | 0.955 |" in collapsed(card.text)
    assert "## Results" not in make_card().text


def test_nothing_private_is_published():
    args = make_args(
        hub_token="hf_abc",
        vllm_server_host="10.1.2.3",
        vllm_server_base_url="http://10.1.2.3:8000",
        retrieval_log="/home/ann/log",
        resume_from_checkpoint="/home/ann/runs/secret/checkpoint-1",
        model_init_kwargs={"token": "hf_abc", "dtype": "bfloat16", "cache_dir": "/home/ann/cache"},
        run_name="ann's secret",
    )
    card = make_card(
        args=args,
        base_model="/home/ann/models/base",
        retriever=HTTPRetriever("http://ann:pass@10.1.2.3:8000"),
        dataset_names=["/home/ann/data/questions.jsonl", "PeterJinGo/nq_hotpotqa_train"],
    )
    for secret in ("hf_abc", "10.1.2.3", "/home", "secret", "pass@"):
        assert secret not in card.content
    for said in ("`HTTPRetriever`", "`questions.jsonl`", '`{"dtype": "bfloat16"}`'):
        assert said in card.content
    assert card.data.base_model is None
    assert card.data.datasets == ["PeterJinGo/nq_hotpotqa_train"]
    assert "a fine-tuned version of a model that is not on the Hub" in card.text


def test_options_that_differ_from_their_defaults_are_listed():
    args = make_args(
        folr_alpha=0.25, advantage_level="turn", beta=0.04, num_generations=4, max_searches=2, logging_steps=3
    )
    found = non_default_options(args)
    assert {"folr_alpha": 0.25, "advantage_level": "turn", "beta": 0.04, "num_generations": 4}.items() <= found.items()
    assert not {"max_searches", "logging_steps", "output_dir", "use_cpu", "steps_per_generation"} & set(found)
    card = make_card(args=args, search_config=SearchConfig(max_searches=2))
    assert "| `folr_alpha` | `0.25` |" in collapsed(card.text)
    assert "| `max_searches` | 2 |" in collapsed(card.text)
    assert set(non_default_options(make_args())) <= {"bf16"}


def test_data_sets_are_listed_with_their_sizes(tmp_path):
    mixed = Dataset.from_list([{"data_source": source} for source in ["nq", "nq", "hotpotqa"]])
    text = make_card(train_dataset=mixed, eval_dataset={"nq": rows(2, data_source="nq")}).text
    assert "| training | `nq` 2, `hotpotqa` 1 | 3 |" in collapsed(text)
    assert "| evaluation `nq` | `nq` | 2 |" in collapsed(text)
    assert "| training | not named | streamed |" in collapsed(
        make_card(train_dataset=rows(2).to_iterable_dataset()).text
    )
    # The folder in which `load_dataset` stores its downloads
    rows(1200).save_to_disk(tmp_path / "PeterJinGo___nq_hotpotqa_train" / "default")
    card = make_card(train_dataset=load_from_disk(tmp_path / "PeterJinGo___nq_hotpotqa_train" / "default"))
    assert card.data.datasets == ["PeterJinGo/nq_hotpotqa_train"]
    assert "https://huggingface.co/datasets/PeterJinGo/nq_hotpotqa_train) | 1,200 |" in collapsed(card.text)


@pytest.mark.parametrize(("base", "argument"), [("Qwen/Qwen2.5-3B", ""), ("/home/ann/base", ", base_model=")])
def test_card_of_an_adapter_names_its_base_model(base, argument):
    card = make_card(adapter=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]), base_model=base)
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert f'from_pretrained("ann/agent"{argument}' in card.text
    assert "LoRA of rank 16, `lora_alpha` 8, on `q_proj`, `v_proj`." in card.text


def test_headings_are_complete_and_nothing_of_the_template_remains():
    card = make_card(eval_dataset={"nq": rows(2)}, log_history=EVALUATED[:1], step=0)
    headings = [
        line for line in card.text.splitlines() if line.startswith("#") and line.startswith(("# ", "## ", "### "))
    ]
    assert headings == [
        "# Model Card for agent",
        "## Quick start",
        "## Results",
        "## How it searches",
        "## Training procedure",
        "### Data",
        "### Retriever",
        "### Options",
        "### Framework versions",
        "## Citations",
    ]
    assert "None" not in card.text
    assert "time machine" not in card.text  # TRL's own quick start
    assert "licence" not in card.data.to_dict()
    assert "@article{ma2026tspo}" in card.text
    assert "Question: {question}" in card.text
    assert "`agent.rollout_prompts" in make_card(search_config=SearchConfig(prompt_template=None)).text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("squad", "squad"),
        ("questions.jsonl", None),
        ("/models/base", None),
        ("a/b/c", None),
        (None, None),
    ],
)
def test_hub_ids_are_distinguished_from_paths(name, expected):
    assert hub_id(name) == expected


def test_an_existing_folder_is_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert hub_id("runs/base") is None
