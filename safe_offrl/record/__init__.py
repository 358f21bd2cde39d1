"""What is written down and said of a run: its folder, ledger, checkpoints and progress."""
