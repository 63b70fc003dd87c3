"""`python train.py ...` is `minillama train ...`; without arguments it trains the model of configs/train/tiny.toml."""

import sys

from minillama.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], prog="python train.py"))
