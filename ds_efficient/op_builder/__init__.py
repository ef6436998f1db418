"""Build and load the native ops: table of ops, compilers, locks, builders with DeepSpeed's interface."""
