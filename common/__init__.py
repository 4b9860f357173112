"""What several packages need: settings, processes, weights files, labels, locks and the command-line harness."""
