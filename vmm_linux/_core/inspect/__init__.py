"""Mappings and pages of any process, as they are read."""
