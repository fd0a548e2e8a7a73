"""Saving, loading and sharing of models: `search_config.json` beside the weights, and the model card.

May import: `rollout`, `retrieval`, `support`.
"""
