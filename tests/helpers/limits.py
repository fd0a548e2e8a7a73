"""Limits for the tiny policy in the tests of training, evaluation and agents."""

LIMITS = {"max_searches": 3, "num_passages": 2, "max_turn_tokens": 12, "max_observation_tokens": 48}
