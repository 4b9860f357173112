"""Training the network on clips from `dali_pipelines`."""
