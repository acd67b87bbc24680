"""Training algorithms: one file per algorithm, or one per close family."""
