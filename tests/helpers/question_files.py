"""Rows of questions in the formats of published data sets, and files of them."""

import json

GOOD = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen", "Austen"]}
OURS = ["id", "question", "golden_answers", "data_source"]


SQUAD = [
    {
        "qid": 5,
        "query": "Who?",
        "answers": {"text": ["A", "B"], "answer_start": [1, 2]},
        "all": [{"name": "C"}, {"name": "D"}],
    },
    {"qid": 6, "query": "Where?", "answers": {"text": ["E"], "answer_start": [3]}, "all": [{"name": "F"}]},
]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def search_r1_row(index, data_source, metadata=None):
    """A row in the format of `PeterJinGo/nq_hotpotqa_train`."""
    answers = [f"answer {index}", "another"]
    return {
        "id": f"train_{index}",
        "question": f"question {index}?",
        "golden_answers": answers,
        "data_source": data_source,
        "prompt": [{"role": "user", "content": f"Answer the given question. Question: question {index}?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": answers}, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
        "metadata": metadata,
    }


HOTPOT = {"type": "bridge", "level": "easy", "context": {"title": ["A"], "sentences": [["One.", "Two."]]}}
SEARCH_R1 = [search_r1_row(0, "nq"), search_r1_row(1, "nq"), search_r1_row(0, "hotpotqa", HOTPOT)]


def as_list(dataset):
    return [{column: row[column] for column in OURS} for row in dataset]


def verl_row(index, answers=("answer", "another")):
    """A row in the format of verl's `preprocess_search_r1_dataset.py`."""
    question, truth = f"question {index}?", {"target": list(answers)}
    return {
        "data_source": "searchR1_nq",
        "prompt": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": question}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {
            "index": index,
            "need_tools_kwargs": True,
            "question": question,
            "split": "train",
            "tools_kwargs": {"search": {"create_kwargs": {"ground_truth": truth, "question": question}}},
        },
        "metadata": None,
    }


MUSIQUE = [
    {
        "id": "2hop__1",
        "paragraphs": [{"idx": 0, "title": "A", "paragraph_text": "One.", "is_supporting": True}],
        "question": "When?",
        "question_decomposition": [{"id": 1, "question": "Who?", "answer": "B", "paragraph_support_idx": 0}],
        "answer": "1969",
        "answer_aliases": ["MCMLXIX", "1969"],
        "answerable": True,
    },
    {
        "id": "3hop__2",
        "paragraphs": [],
        "question": "Where?",
        "question_decomposition": [],
        "answer": "Rome",
        "answer_aliases": [],
        "answerable": True,
    },
]

POPQA = [
    {"id": 4222362, "subj": "George Rankin", "prop": "occupation", "obj": "politician", "s_pop": 142},
    {"id": 4222363, "subj": "1984", "prop": "author", "obj": "George Orwell", "s_pop": 100},
]
POPQA = [
    {**row, "question": f'What is George Rankin\'s "{row["prop"]}"?', "possible_answers": json.dumps([row["obj"], "é"])}
    for row in POPQA
]
