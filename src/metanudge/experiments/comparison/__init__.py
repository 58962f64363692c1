"""Every estimator on the same network, tasks and meta-steps, each at its best on one shared grid."""
