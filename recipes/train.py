"""Train a search agent.

Without questions, model and passages, it runs the embedded demo: a tiny model learns to search a fictional encyclopedia, in a
few minutes on two CPU cores and without a network.

    accelerate launch recipes/train.py
    accelerate launch recipes/train.py --config recipes/configs/hotpotqa_sample.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml recipes/train.py \
        --config recipes/configs/qwen2.5_3b_nq_hotpotqa.yaml \
        --retriever_url http://localhost:8000
    accelerate launch recipes/train.py --config ... --resume_from_checkpoint true
    accelerate launch recipes/train.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name questions.jsonl \
        --corpus passages.jsonl --output_dir runs/mine --max_searches 2
    accelerate launch recipes/train.py --dataset_name mine.jsonl PeterJinGo/nq_hotpotqa_train \
        --eval_dataset_name nq hotpotqa --max_eval_questions 500 --eval_strategy steps --eval_steps 50 ...

Every option of TSPOConfig is a flag and a key of the YAML files. `tspo train` is the same command on one process.
"""

from tspo_trl.commands.errors import run_command
from tspo_trl.commands.train import SearchArguments, main

__all__ = ["SearchArguments", "main"]

if __name__ == "__main__":
    run_command(main)
