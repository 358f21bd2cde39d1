"""Presets, one YAML file an environment: what differs from its base, and that from the defaults."""
