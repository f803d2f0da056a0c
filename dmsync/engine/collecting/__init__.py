"""Garbage collection: what nothing names and nobody can bring back any more goes.

roots.py says what is named and for how long undo needs the rest, marking.py walks what that needs,
leftovers.py knows what killed processes left, collection.py is `dm gc`, space.py is `dm df`.
"""
