"""Presets, one YAML file an environment: only what differs from the dataclass defaults."""
