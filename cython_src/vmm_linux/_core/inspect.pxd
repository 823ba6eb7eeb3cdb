"""Contract of inspect."""


