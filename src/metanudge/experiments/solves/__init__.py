"""How inner problems are best solved: the solvers that were considered, on the problems they have to solve."""
