"""The laboratory's framework: what runs experiments, and shows what they found."""
