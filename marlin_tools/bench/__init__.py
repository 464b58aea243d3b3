"""How fast: products, decoding and quantising, each against a rival in the same run."""
