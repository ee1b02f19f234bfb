"""What runs were asked, what they did and what it cost, as one HTML page and the same in Markdown."""

from rfa_llm.report.page import write_report
from rfa_llm.report.runs import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
