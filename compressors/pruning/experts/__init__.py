"""Expert pruning and merging: coefficients, how they are bred, what is kept of a search. No model code."""
