"""A report of what was found, as one HTML file that needs nothing else."""

from dropinf.reporting.report import write_report

__all__ = ["write_report"]
