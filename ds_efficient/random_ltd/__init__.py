"""random_ltd"""
