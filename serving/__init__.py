"""Taking weights to users: prediction on videos, export and the formats of answers."""
