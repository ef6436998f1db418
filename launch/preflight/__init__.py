"""Checks of a cluster before a long run; ``check_cluster.py`` puts them together."""
