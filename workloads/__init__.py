"""Fixed problems: one file per workload with its model, data, loss and metric."""
