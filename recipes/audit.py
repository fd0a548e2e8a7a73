"""Check whether a retriever and its corpus support training on given questions, and which golden answers FOLR can use.

Run it before you spend GPU hours. It prints tables and a verdict, and writes OUT/audit.json and OUT/audit.png.

    python recipes/audit.py --dataset_name questions.jsonl --corpus passages.jsonl
    python recipes/audit.py --dataset_name questions.jsonl --retriever_url http://localhost:8000/retrieve --max_questions 1000
    python recipes/audit.py --dataset_name demo

Each row has a `question` and its `golden_answers` (a list of strings). With `supporting_titles` (a list of strings), the
audit also searches for the titles as ideal queries; with `supporting_ids` (a list of strings), it measures the recall of
the supporting passages.
"""

from tspo_trl.commands.audit import main
from tspo_trl.commands.errors import run_command

if __name__ == "__main__":
    run_command(main)
