"""`python generate.py ...` is `minillama generate ...`: continue a prompt with a trained model."""

import sys

from minillama.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]], prog="python generate.py"))
