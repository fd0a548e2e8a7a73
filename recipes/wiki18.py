"""Get the Wikipedia dump of 2018 in 21 million passages, with its published indexes, and serve it.

    python recipes/wiki18.py all --subset 100000     # a first try: the first 100,000 passages with their vectors
    python recipes/wiki18.py all --index_form small  # everything: 2 GB of memory, 31 GB of disk beside the downloads

`tspo wiki18 --help` describes the steps and options.
"""

from tspo_trl.commands.errors import run_command
from tspo_trl.commands.wiki18 import main

if __name__ == "__main__":
    run_command(main)
