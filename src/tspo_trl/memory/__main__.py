"""`python -m tspo_trl.memory` is the command `tspo memory`. See `tspo_trl.memory.estimate`."""

from .estimate import main

if __name__ == "__main__":
    main()
