"""random-LTD: random token dropping with a learning rate by layer tokens."""
