"""Run directories in, tables, figures and one self-contained page out. No model, GPU or network is needed."""

from kullback.report.page import write_report
from kullback.report.runs import RunData, load_runs
from kullback.report.table import comparison_markdown, comparison_rows, comparison_table

__all__ = ["RunData", "comparison_markdown", "comparison_rows", "comparison_table", "load_runs", "write_report"]
