"""Turns folders and lists of videos into the manifests that training reads. Nothing here needs torch."""
