"""Undo: an operation is taken back by appending what turns its events round, trees included.

reversal.py turns events, returning.py brings working trees back, lifecycle.py is `dm undo` and
`dm redo`, going_back.py is `dm op restore`.
"""
