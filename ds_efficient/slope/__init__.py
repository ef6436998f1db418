"""slope"""
