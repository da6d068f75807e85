"""Claims of papers brought to a verdict: runs, measurements, thresholds, reports."""
