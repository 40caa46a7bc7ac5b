"""Pictures of a result file of training: each file draws one, from the runs that `runs` reads."""
