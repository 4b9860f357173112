"""Shared by several packages: settings, processes, weights files, labels, locks and the command-line harness."""
