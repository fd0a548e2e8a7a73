"""Evaluate models on questions with golden answers: exact match, F1 and retrieval, with confidence intervals.

    python recipes/evaluate.py --model my-search-agent --dataset_name benchmarks --retriever_url http://localhost:8000
    python recipes/evaluate.py --model base=Qwen/Qwen2.5-3B trained=runs/mine --dataset_name questions.jsonl --corpus passages.jsonl
    python recipes/evaluate.py --model Qwen/Qwen2.5-7B-Instruct --endpoint http://localhost:8001/v1 --dataset_name hotpotqa ...
    python recipes/evaluate.py --compare runs/evaluation/base runs/evaluation/trained

A model is a folder, a name on the Hub or a LoRA adapter; with --endpoint, the name of a model on a server with the OpenAI
interface. A data set is one of the seven benchmarks (nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle;
'benchmarks' means all of them), a file with 'question' and 'golden_answers' (JSONL, JSON, CSV, parquet), or a data set on
the Hub. NAME=MODEL and NAME=DATASET name them in the results. An evaluation can be stopped at any time: the same command
resumes it.
"""

from tspo_trl.commands.errors import run_command
from tspo_trl.commands.evaluate import main

if __name__ == "__main__":
    run_command(main)
