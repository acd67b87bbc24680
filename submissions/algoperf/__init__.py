"""Submissions written for AlgoPerf's interface (github.com/mlcommons/algorithmic-efficiency), unchanged."""
