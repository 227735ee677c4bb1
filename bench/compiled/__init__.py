"""The compile gate: every kernel as its launcher would launch it, compiled and read, with no GPU.

calls    launcher calls, each with what its kernels must show
device   a driver that claims a GPU and runs nothing
plan     which calls compile which kernels; two processes that do
code     what a compiled kernel is made of: from its PTX (ptx) and its SASS (sass)
table    the committed figures, and what counts as a regression
"""
