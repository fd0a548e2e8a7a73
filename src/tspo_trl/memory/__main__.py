"""`python -m tspo_trl.memory` is the command `tspo memory`. See `tspo_trl.memory.estimate`."""

from importlib import import_module

if __name__ == "__main__":
    # The command knows every option of a run, and refuses others. This package knows only those that affect the memory
    import_module("tspo_trl.commands.memory").main()
