"""The command lines: parse arguments, call the other packages and report. The top-level scripts only start them."""
