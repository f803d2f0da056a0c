"""Three-way merge of whole dot states: trees, units, drivers, conflicts and the merge's life."""
