"""What was achieved: committed results, and the code that reads, checks, compares and draws them.

Imports no torch, so that reading logs starts at once.
"""
