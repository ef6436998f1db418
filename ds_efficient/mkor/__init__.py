"""MKOR: second-order preconditioning with rank-1 updates of the inverse factors."""
