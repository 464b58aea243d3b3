"""The stages that change or store weights block by block: quantize, prune, and export into other formats."""
