"""Fixed problems: one file per workload (model, data, loss, metric)."""
