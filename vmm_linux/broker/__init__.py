"""The broker: a process that keeps buffers by name, and gives them to whom its policy allows.

``vmm-linux broker`` runs one for a machine; each user has one of their own on demand, which the
first client starts. Clients use ``vmm_linux.names``.
"""
