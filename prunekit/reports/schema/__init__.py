"""The structure of ``report.json``, checked once where a report is read."""
