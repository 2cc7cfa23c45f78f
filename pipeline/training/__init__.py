"""Training: the loop (trainer), the distributed engine, EMA, checkpoints, progress and its ledger, and the watchdog."""
