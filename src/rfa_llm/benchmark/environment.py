"""What a result file says of where it was made."""

from __future__ import annotations

from rfa_llm.receipt import machine, versions


def environment(*more: str) -> dict:
    """Versions (of `more` packages too) and machine; no name or path that tells which machine it is."""
    return {"versions": versions(*more), "machine": machine()}
