"""Judges weights: predicts a manifest, computes metrics, writes and reads results, compares them and draws a report."""
