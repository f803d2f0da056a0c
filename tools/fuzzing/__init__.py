"""Coverage-guided fuzzing of every decoder: `python -m tools.fuzzing NAME... --runs N --seed S`.

decoders.py says what is fuzzed, mending.py carries inputs past checksums, mutating.py changes the
values inside; corpus/NAME/ holds what each began with and what found something new.
"""
