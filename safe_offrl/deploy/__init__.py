"""A policy at work: episodes behind its shield, evaluation, and export."""
