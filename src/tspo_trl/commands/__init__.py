"""The subcommands of `tspo`, one module each."""
