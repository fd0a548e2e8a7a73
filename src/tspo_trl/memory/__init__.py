"""The memory of a GPU in training, calculated before anything is loaded. Imports nothing else of the library."""
