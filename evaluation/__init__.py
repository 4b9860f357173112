"""Judging weights: predictions for a manifest, metrics, the files of results, comparison and report."""
