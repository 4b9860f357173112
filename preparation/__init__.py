"""Turns folders and lists of videos into the manifests that training reads. Does not import torch."""
