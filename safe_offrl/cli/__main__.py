"""`python -m safe_offrl.cli`, which starts the command line in another process."""

from safe_offrl.cli import main

main()
