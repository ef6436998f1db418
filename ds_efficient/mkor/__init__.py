"""mkor"""
