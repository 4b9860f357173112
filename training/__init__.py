"""Training and evaluation of the network on clips from `dali_pipelines`."""
