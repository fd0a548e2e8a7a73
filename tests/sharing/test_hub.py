"""Sharing with the real client of the Hub and a small local Hub."""

import json
import os
import re
import subprocess
import sys

import httpx2
import pytest
from huggingface_hub import ModelCard

from helpers.paths import HELPERS
from helpers.servers import Server
from tspo_trl import SearchConfig

MODEL_FILES = {"model.safetensors", "config.json", "generation_config.json"}
ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json"}
COMMON_FILES = {"README.md", "search_config.json", "tokenizer.json", "tokenizer_config.json", ".gitignore"}


@pytest.fixture(scope="module")
def shared(policy_dir, tmp_path_factory):
    """The results of the processes that pushed and downloaded, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("hub")
    with Server(script=HELPERS / "fake_hub.py") as hub:
        results = {}
        for step in ("push", "use"):
            environment = {
                **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": "hf_test",
                "HF_HOME": str(folder / f"home-{step}"),  # the cache of the second process is empty
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-W", "ignore", str(HELPERS / "share_on_hub.py"), step, policy_dir, str(folder)]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, run.stderr[-4000:]
            results[step] = json.loads((folder / f"{step}.json").read_text())
        results["commits"] = {
            name: httpx2.get(f"{hub.url}/fake/commits/user/{name}").json() for name in ("full", "adapter", "steps")
        }
    return results, folder


def same(found, expected):
    """Assert that two sets of rollouts have the same tokens and, except for rounding, the same log-probabilities."""
    assert len(found) == len(expected) > 0
    for turns, others in zip(found, expected, strict=True):
        assert [turn[0] for turn in turns] == [turn[0] for turn in others]
        assert [turn[2] for turn in turns] == [turn[2] for turn in others]
        for turn, other in zip(turns, others, strict=True):
            assert turn[1] == pytest.approx(other[1], abs=1e-4)
    return True


@pytest.mark.parametrize("name", ["full", "adapter", "steps"])
def test_downloaded_model_answers_like_the_pushed_model(shared, name):
    results, _ = shared
    assert same(results["use"][name], results["push"][name])
    with pytest.raises(AssertionError):  # and unlike the model before training
        same(results["use"][name], results["push"]["base"])


def test_folders_of_runs_can_be_loaded(shared):
    results, _ = shared
    assert same(results["use"]["local"], results["push"]["full"])
    assert same(results["use"]["local adapter"], results["push"]["adapter"])


def test_a_snapshot_can_be_used_offline(shared):
    results, _ = shared
    assert same(results["use"]["offline"], results["push"]["full"])


def test_the_repository_contains_the_files_for_inference_and_no_rollouts(shared):
    results, folder = shared
    files = {name: set(names) for name, names in results["use"]["files"].items()}
    assert files["full"] == MODEL_FILES | COMMON_FILES | {".gitattributes"}
    assert files["adapter"] == ADAPTER_FILES | COMMON_FILES | {".gitattributes"}
    assert {
        f"last-checkpoint/{name}" for name in ADAPTER_FILES | {"search_config.json", "trainer_state.json"}
    } <= files["steps"]
    assert not [name for names in files.values() for name in names if "trajectories" in name or "training_args" in name]
    assert list((folder / "full" / "trajectories").iterdir())  # the local rollouts are kept
    assert SearchConfig.load(folder / "full").max_searches == 3
    assert SearchConfig.load(folder / "full" / "checkpoint-1") == SearchConfig.load(folder / "full")


def test_every_checkpoint_is_pushed_with_settings_and_card(shared):
    results, _ = shared
    messages = [commit["message"] for commit in results["commits"]["full"]]
    assert messages[1:3] == ["Training in progress, step 1", "Training in progress, step 2"]
    assert messages[-1] == "End of training"
    for commit in results["commits"]["full"][1:]:
        assert {"search_config.json", "README.md", "model.safetensors"} <= set(commit["files"])
    assert [c["message"] for c in results["commits"]["adapter"]] == ["initial commit", "End of training"]


@pytest.mark.parametrize(("case", "status"), [("refused", "401"), ("failed", "500")])
def test_failed_push_loses_nothing(shared, case, status):
    results, folder = shared
    attempt = results["push"][case]
    assert status in attempt["error"]
    assert f"The model is saved in {str(folder / 'adapter')!r}" in attempt["error"]
    assert "hf upload" in attempt["error"]
    assert {"adapter_model.safetensors", "adapter_config.json", "search_config.json", "tokenizer.json"} <= set(
        attempt["files"]
    )


def test_failed_push_of_a_checkpoint_is_reported_and_training_continues(shared):
    results, _ = shared
    assert "403" in results["push"]["warnings"]
    assert results["push"]["warnings"].count("could not be pushed to the Hub") >= 2
    assert [c["message"] for c in results["commits"]["steps"]][:2] == ["initial commit", "Training in progress, step 3"]


def test_the_card_describes_the_run(shared):
    _, folder = shared
    card = ModelCard.load(folder / "full" / "README.md")
    assert {"trl", "tspo", "search-agent", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert card.data.model_name == "full"
    measured = {result.metric_type: result for result in card.data.eval_results}
    assert {"reward", "hit_rate", "searches"} <= set(measured)
    assert {result.dataset_name for result in measured.values()} == {"books"}
    assert all(isinstance(result.metric_value, float) for result in measured.values())
    text = re.sub(" +", " ", card.text)  # table cells are padded
    for expected in (
        "`books.jsonl`",
        "`BM25Retriever`",
        "e646a21666c557c0",
        "`num_generations` | `4`",
        "@article{ma2026tspo",
    ):
        assert expected in text
    assert "before training | step 2 |" in text
    assert str(folder) not in card.content
    assert "hf_test" not in card.content


def test_the_card_of_an_adapter_names_its_base_and_its_data(shared):
    _, folder = shared
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "user/base"
    assert card.data.datasets == ["user/questions"]
    assert "LoRA of rank 4" in card.text
    assert 'SearchAgent.from_pretrained("user/adapter", retriever' in card.text


def test_the_snippet_of_the_card_runs(shared):
    results, _ = shared
    queries, answer = results["use"]["snippet"]
    assert queries.startswith("[")
    assert answer
