"""The command lines: they parse arguments, call the other packages and report. Top-level scripts only start them."""
