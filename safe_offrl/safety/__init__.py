"""What keeps a policy safe: critic, multiplier, acceptance, shield, monitor, deployment."""
