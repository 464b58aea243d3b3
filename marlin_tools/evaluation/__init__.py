"""What a model can do: tasks through lm-eval, perplexity and divergence on text, and text that it generates."""
