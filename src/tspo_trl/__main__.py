"""`python -m tspo_trl` is the command `tspo`."""

from .commands.main import main

if __name__ == "__main__":
    main()
