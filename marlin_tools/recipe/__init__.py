"""A recipe as a checked value: its files, the tables that many share, and YAML with a line and a column for every mistake."""
