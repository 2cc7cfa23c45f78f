"""Tasks: how members of a batch condition the network, one file per task."""
