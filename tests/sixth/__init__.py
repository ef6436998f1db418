"""A sixth technique, for tests: one folder and one row of the table are all it takes."""
