"""Can this retriever and corpus support training on these questions, and which golds can FOLR use?

Run it before you spend GPU hours. It prints tables and a verdict, and writes OUT/audit.json and OUT/audit.png.

    python recipes/audit.py --dataset questions.jsonl --corpus passages.jsonl
    python recipes/audit.py --dataset questions.jsonl --retriever_url http://localhost:8000/retrieve --max_questions 1000
    python recipes/audit.py --dataset demo

Questions are rows of `question` and `golden_answers` (a list of strings). With `supporting_titles` (a list of strings) the
ideal queries are tried too, with `supporting_ids` (a list of strings) the retriever itself is judged.
"""

from tspo_trl.commands.audit import main

if __name__ == "__main__":
    main()
