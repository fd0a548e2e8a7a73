"""`python -m tspo_trl.inspect` is the command `tspo inspect`. See `tspo_trl.commands.inspect`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.argv[0] = "tspo inspect"  # the usage line shows it
    # The command reads the options; this package only loads and writes
    import_module("tspo_trl.commands.inspect").main()
