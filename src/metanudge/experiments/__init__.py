"""The paper's experiments, one readable file each; ``metanudge reproduce`` runs them."""
