"""What a run minimizes: the loop, commits and records know only the interface in base.py."""
