"""op_builder"""
