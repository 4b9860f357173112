"""Uses trained weights: predicts videos, formats and plots the predictions, and exports to other runtimes."""
