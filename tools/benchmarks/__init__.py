"""Comparison with other programs on the same data in the same run: `tools/bench --compare`.

__main__        the command line: runs rows within their budget, writes the result after each
rows/           what is measured: one module for each group of rows, and their registry
workspace       what rows share: sizes, data sets made once, places to work in
data_sets       PostgreSQL under pgbench, directories of many files, incompressible data
synthetic       a file too large for the disk, its content made while it is read
peers           the programs compared, each doing its usual thing in a store of its own
senders         the same for what brings another machine up to date
raw_ssh         what asyncssh alone carries
measuring, launch   one command: wall time, CPU, memory, bytes written
references      floors: what no store and no protocol can go below
machine         what the figures were measured on and with
result          the result as JSON: samples, checks against targets, stages, series
report, plots   docs/performance.md, its figures, and the README's section
pack_variants   ways of storing differences, the measurements behind the pack format
"""
