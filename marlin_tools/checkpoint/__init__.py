"""Everything that touches a model directory: reading, writing, publishing, its journal and its manifest."""
