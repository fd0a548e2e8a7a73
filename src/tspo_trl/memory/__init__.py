"""The memory of a GPU in training, calculated before anything is loaded. May import: `support`, `engines`, `rollout`."""
