"""Where the workloads' data come from, checked by content hash whatever the source."""
