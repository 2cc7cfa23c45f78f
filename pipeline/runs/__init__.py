"""What lies in a run directory: commits, averages, ledger, lease, and what proves them."""
