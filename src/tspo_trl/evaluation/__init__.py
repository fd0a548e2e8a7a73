"""Evaluating a model outside the trainer: rollouts of questions, scores with intervals, comparisons, and their files.

May import `agent`, `credit`, `scoring`, `rollout`, `engines`, `retrieval`, `questions`, `support`.
"""
