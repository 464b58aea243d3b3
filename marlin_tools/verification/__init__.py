"""Whether a result is what it says: its files, its values, its outputs, and what other engines can load."""
