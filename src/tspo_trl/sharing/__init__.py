"""What is saved and pushed for others: `search_config.json` beside the weights, and the model card.

May import `rollout`, `retrieval`, `support`.
"""
