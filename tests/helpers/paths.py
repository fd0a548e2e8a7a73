"""Paths of the repository, its test scripts and its sample of real questions."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
HELPERS = TESTS / "helpers"
HOTPOTQA = TESTS / "data" / "hotpotqa"
TRAIN_ON_RANKS = HELPERS / "train_on_ranks.py"
ACCELERATE_CONFIGS = ROOT / "recipes" / "accelerate"
