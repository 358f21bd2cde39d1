"""Comparisons of runs: numbers, tables, charts, pages and videos."""
