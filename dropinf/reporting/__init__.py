"""A report of what was found, as one HTML file that needs nothing else."""

from dropinf.reporting.charts import area
from dropinf.reporting.report import write_report

__all__ = ["area", "write_report"]
