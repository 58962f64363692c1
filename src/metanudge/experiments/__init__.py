"""What ``metanudge reproduce`` runs: one folder an experiment, one readable file a study."""
