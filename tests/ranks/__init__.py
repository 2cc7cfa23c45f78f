"""What tests start as ranks of a job: python -m ranks.NAME."""
