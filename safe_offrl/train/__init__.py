"""Both loops, offline and online, with their settings."""
