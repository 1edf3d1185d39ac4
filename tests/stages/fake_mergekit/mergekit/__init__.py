"""Stands for mergekit: the mean of whole models in float32, written as bfloat16.

As mergekit does, it writes weights and a config.json. A model of which the path ends in /broken
gives a NaN, and `normalize: false` is what its method does not take.
"""
