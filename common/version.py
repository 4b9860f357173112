"""The version of this project; `setup.py` reads it here."""

VERSION = "0.1.0"
