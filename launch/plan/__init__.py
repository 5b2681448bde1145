"""What a job will need and how long it will take on a cluster, from a trace of the code that trains."""
