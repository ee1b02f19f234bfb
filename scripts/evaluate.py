"""`rfa-llm evaluate` as a script."""

import sys

from rfa_llm.cli.evaluate import main
from rfa_llm.cli.main import run

if __name__ == "__main__":
    run(main, sys.argv[1:])
