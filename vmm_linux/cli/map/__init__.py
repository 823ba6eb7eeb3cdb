"""The command ``map``: a picture of where a process's memory is."""
