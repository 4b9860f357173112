"""Takes weights to users: predictions for videos, their formats and plots, and exports to other runtimes."""
