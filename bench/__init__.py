"""Benchmarks: ``python -m bench`` lists them, ``python -m bench NAME`` runs one.

A benchmark is a module of this folder with a docstring and a function ``run(bench, ...)``;
the other parameters of ``run`` become its command-line options.
"""
