"""Starting runs: the launcher of one machine, Slurm, Ray's nodes, and the plan of what a run needs."""
