"""What a policy is: distributions over actions, networks, and a numpy form that acts."""
