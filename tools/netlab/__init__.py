"""A network in user space: links with delay, rate and cuts, for tests and measurements."""
