"""From videos as people have them to the manifests that training reads. Only `budget` needs torch."""
