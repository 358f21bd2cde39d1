"""Certificates of final policies, and their page."""
