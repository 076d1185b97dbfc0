"""What runs inside Triton: the models of `model_repository/`, each callable and tested without Triton.

A served model takes the requests that Triton's batcher merged, as dictionaries of arrays, and returns for each request
its outputs or the error that is its alone.
"""
