"""`python -m minillama` is `minillama`."""

import sys

from minillama.commands.cli import main

sys.exit(main())
