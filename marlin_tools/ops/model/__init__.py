"""What a model does besides products with packed weights: attention, norms, gates, rotary embeddings."""
