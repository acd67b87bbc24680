"""Pacemark's harness: training, time, records. It knows no workload and no optimizer by name."""
