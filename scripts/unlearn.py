"""`rfa-llm unlearn` as a script: `accelerate launch scripts/unlearn.py --config configs/unlearn.yaml`."""

import sys

from rfa_llm.cli.main import run
from rfa_llm.cli.unlearn import main

if __name__ == "__main__":
    run(main, sys.argv[1:])
