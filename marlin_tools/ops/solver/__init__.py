"""What quantising needs on a GPU: column sweeps, searches for scales, and products that stand in for float32."""
