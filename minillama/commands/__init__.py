"""Subcommands of `minillama`, one file each: an `Args` dataclass and `run(args) -> exit status`."""
