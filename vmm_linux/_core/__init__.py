"""The core: what the endpoint is made of. Nothing here is public."""
