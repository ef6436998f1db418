"""Python face and plain-torch reference of every native op."""
