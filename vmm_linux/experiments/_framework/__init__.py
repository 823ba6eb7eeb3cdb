"""The laboratory's framework, which runs experiments and shows their results."""
