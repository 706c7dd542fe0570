"""Many runs: methods × seeds from a study file, as jobs here or on Slurm, and what comes of them."""
