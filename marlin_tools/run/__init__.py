"""Plan a recipe, execute it stage by stage, and hold what comes out against the numbers that it expects."""
