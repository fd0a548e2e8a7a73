"""The cold start: demonstrations of searches, and supervised training on them, before a model is trained by its own rollouts.

May import: `training`, `agent`, `credit`, `scoring`, `rollout`, `retrieval`, `sharing`, `questions`, `support`.
"""
