"""`python -m tspo_trl.memory`: will it fit? See `tspo_trl.memory.estimate`."""

from .estimate import main

if __name__ == "__main__":
    main()
