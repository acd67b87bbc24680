"""The data of the workloads: reading, preparing and decoding. Every source is checked by a content hash."""
