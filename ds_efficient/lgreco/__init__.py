"""lgreco"""
