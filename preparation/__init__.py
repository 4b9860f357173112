"""From videos as people have them to the manifests that training reads. Nothing here needs torch."""
