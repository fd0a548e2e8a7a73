"""Teach a model to search before it is trained by its own rollouts: supervised training on demonstrations.

A base model, or a small one, may never search, so that no rollout can be rewarded. From questions, golden answers and a
retriever, this command makes demonstrations in the tokens of the protocol, trains the model on them, and saves it for
`recipes/train.py`.

    accelerate launch recipes/cold_start.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name questions.jsonl \
        --corpus passages.jsonl --max_searches 2 --output_dir runs/cold_start
    accelerate launch recipes/train.py --model_name_or_path runs/cold_start --dataset_name questions.jsonl \
        --corpus passages.jsonl --max_searches 2 --output_dir runs/mine

Each row has a `question` and its `golden_answers`. With `supporting_titles` (a list of strings), several searches are
demonstrated. Every option of ColdStartConfig is a flag and a key of the YAML files; --use_peft true trains an adapter and merges
it. `tspo cold_start` is the same command on one process.
"""

from tspo_trl.commands.cold_start import main
from tspo_trl.commands.errors import run_command

if __name__ == "__main__":
    run_command(main)
