"""From foreign files to logged data: formats, names, units, ends of episodes, validation."""
