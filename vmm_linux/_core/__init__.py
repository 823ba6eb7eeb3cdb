"""The core: the layers below the public modules. Nothing here is public."""
