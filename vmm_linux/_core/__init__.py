"""The compiled core, a module for each of its layers."""
