"""`rfa-llm finetune` as a script."""

import sys
from importlib import import_module

from rfa_llm.cli.main import run

if __name__ == "__main__":
    # Imported within, so that what the libraries say while they load is left out here too.
    run(lambda argv: import_module("rfa_llm.cli.finetune").main(argv), sys.argv[1:])
