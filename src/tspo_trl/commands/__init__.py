"""The subcommands of `tspo`, one module each. May import: every package."""
