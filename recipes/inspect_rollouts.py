"""Write the rollouts of a run as one page, with the reward and advantage of every turn and the reason for them.

    python recipes/inspect_rollouts.py runs/demo
    python recipes/inspect_rollouts.py runs/demo --steps 0-20,100 --output page.html
    python recipes/inspect_rollouts.py runs/demo --terminal --steps 20 --group 3

The page opens from the disk, contains its data and needs no network. The same as `tspo inspect`.
"""

from tspo_trl.commands.errors import run_command
from tspo_trl.commands.inspect import main

if __name__ == "__main__":
    run_command(main)
