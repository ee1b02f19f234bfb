"""Check the bounds of a demo's outcome: `python scripts/check_demo.py [demo-run]`; exits non-zero if one is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

MAX_FORGET_RATIO = 1.3
MIN_UTILITY_RATIO = 0.95


def check(summaries: dict[str, dict[str, float]]) -> bool:
    """Print both ratios against their bounds; whether both hold.

    Args:
        summaries: The `summaries` of `results.json`, with "target", "unlearned" and "retain-only".
    """
    target, unlearned, retain_only = (summaries[name] for name in ("target", "unlearned", "retain-only"))
    forget = unlearned["forget_prob"] / retain_only["forget_prob"]
    utility = unlearned["model_utility"] / target["model_utility"]
    # Written so that a NaN breaks its bound.
    forgotten, useful = forget <= MAX_FORGET_RATIO, utility >= MIN_UTILITY_RATIO
    for holds, what, ratio, bound in (
        (forgotten, "forget_prob, unlearned / retain-only", forget, f"at most {MAX_FORGET_RATIO}"),
        (useful, "model_utility, unlearned / target", utility, f"at least {MIN_UTILITY_RATIO}"),
    ):
        print(f"{'holds ' if holds else 'BROKEN'}  {what}: {ratio:.3f} ({bound})")
    return forgotten and useful


def main(argv: list[str]) -> None:
    path = Path(argv[0] if argv else "demo-run") / "results.json"
    if not path.is_file():
        sys.exit(f"check_demo: {path} is not there; give the folder of a finished demo.")
    summaries = json.loads(path.read_text(encoding="utf-8"))["summaries"]
    if "retain-only" not in summaries:
        sys.exit(f"check_demo: {path} has no retain-only model to compare with; give a demo's that has one.")
    if not check(summaries):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
